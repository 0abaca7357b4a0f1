"""The frozen decoder: causal within a sequence, losses at labelled rows, gradients only to the vectors."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import arc_kernels as ak
from arc_ds.batch.groups import GroupRule
from arc_ds.batch.packing import PackedBatch, PoolingSpec, pack
from arc_ds.model.backbone import Attention, Recompute
from tests.helpers.tiny_compressor import MANY_PARTS, OUTPUT_NORMED, sample, tiny_decoder

SPEC = PoolingSpec((GroupRule("factor", 4),))
EXACT = 1e-13  # measured worst 4e-15; losses are of order ten


def test_losses_are_the_cross_entropy_of_the_logits_at_the_labelled_rows() -> None:
    decoder, batch = tiny_decoder(), pack([sample(3, -9, 5), sample(6, seed=1)], SPEC)
    z = _vectors(batch)
    logits = decoder.logits(batch, z, batch.label_rows)
    expected = F.cross_entropy(logits.double(), batch.labels, reduction="none")
    nll = decoder(batch, z)
    assert nll.shape == (batch.num_labels,) and batch.num_labels == 2 + 4 + 5
    # `logits` are float32 by contract. Rounding of values of order one: measured 5e-8.
    assert torch.allclose(nll, expected, rtol=0, atol=2e-7)


def test_gradients_reach_every_vector_that_a_later_label_sees_and_no_weight() -> None:
    decoder, batch = tiny_decoder(), pack([sample(2, -9, 3, -4), sample(-3, 1, seed=1)], SPEC)
    z = _vectors(batch)
    decoder(batch, z).sum().backward()
    read, unread = z.grad[:4], z.grad[4:]  # no label follows the second or third context
    assert read.abs().amax(dim=1).min() > 0 and not unread.any()
    assert all(p.grad is None for p in decoder.parameters())


def test_a_row_sees_itself_and_what_precedes_it_in_its_own_sequence() -> None:
    decoder, batch = tiny_decoder(), pack([sample(4), sample(3, -4, 4, seed=1), sample(2)], SPEC)
    z = _vectors(batch)
    rows = torch.arange(batch.num_decoder_rows)
    before = decoder.logits(batch, z, rows)
    in_second = (batch.text_rows >= 4) & (batch.text_rows < 13)
    for idx in in_second.nonzero().flatten().tolist():
        row = int(batch.text_rows[idx])
        ids = batch.decoder_ids.clone()
        ids[idx] = (ids[idx] + 1) % decoder.config.vocab_size
        change = (decoder.logits(dataclasses.replace(batch, decoder_ids=ids), z, rows) - before).abs().amax(1)
        assert not change[:row].any() and not change[13:].any()
        assert change[row:13].min() > 1e-6
    moved = z.detach().clone()
    moved[0] += 1.0
    change = (decoder.logits(batch, moved, rows) - before).abs().amax(1)
    assert not change[:7].any() and change[7:13].min() > 1e-6 and not change[13:].any()


def test_a_pack_of_sequences_gives_what_each_gives_alone() -> None:
    decoder = tiny_decoder()
    samples = [sample(3, -9, 5), sample(2, seed=1), sample(-4, -1, 30, seed=2)]
    batch = pack(samples, SPEC)
    z = _vectors(batch)
    parts, start = [], 0
    for one in samples:
        alone = pack([one], SPEC)
        count = alone.compressed_rows.numel()
        parts.append(decoder(alone, z[start : start + count]))
        start += count
    assert torch.allclose(decoder(batch, z), torch.cat(parts), rtol=0, atol=EXACT)


def test_a_vector_equal_to_a_token_embedding_is_that_token() -> None:
    decoder = tiny_decoder()
    batch, z_batch = pack([sample(6)], SPEC), pack([sample(2, -1, 3, marker=None)], SPEC)
    text = batch.decoder_ids
    z = decoder.tok_embeddings.weight[text[2:3]]
    spliced = dataclasses.replace(z_batch, decoder_ids=text[[0, 1, 3, 4, 5]])
    nothing = torch.zeros(0, 12, dtype=torch.float64)
    rows = torch.arange(6)
    assert torch.equal(decoder.logits(spliced, z, rows), decoder.logits(batch, nothing, rows))


def test_a_tied_head_is_the_embedding() -> None:
    decoder = tiny_decoder(tie_embeddings=True)
    assert decoder.output.weight is decoder.tok_embeddings.weight
    assert "output.weight" not in dict(decoder.named_parameters())
    assert tiny_decoder().output.weight is not tiny_decoder().tok_embeddings.weight


def test_rotary_positions_restart_with_each_sequence() -> None:
    decoder, batch = tiny_decoder(), pack([sample(5), sample(5)], SPEC)
    nothing = torch.zeros(0, 12, dtype=torch.float64)
    nll = decoder(batch, nothing)
    assert torch.allclose(nll[:4], nll[4:], rtol=0, atol=EXACT)
    running_on = dataclasses.replace(batch, decoder_positions=torch.arange(10))
    assert torch.allclose(decoder(running_on, nothing), nll, rtol=0, atol=1e-7)  # float32 angles; measured 2e-8
    stretched = dataclasses.replace(batch, decoder_positions=batch.decoder_positions * 2)
    assert (decoder(stretched, nothing) - nll).abs().max() > 1e-3  # distances count


def _vectors(batch: PackedBatch) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    shape = (batch.compressed_rows.numel(), 12)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("parts", [{}, OUTPUT_NORMED, MANY_PARTS], ids=["llama", "output norms", "many parts"])
@pytest.mark.parametrize(("split", "recompute"), [(True, "none"), (False, "full"), (True, "full"), (True, "selective")])
def test_neither_the_split_nor_recomputation_changes_losses_or_gradients(
    split: bool, recompute: Recompute, parts: dict[str, Any]
) -> None:
    batch = pack([sample(3, -9, 4), sample(-5, 3, seed=1), sample(4, seed=2), sample(1, -2, 3, -1, 2, seed=3)], SPEC)
    assert batch.prefix is not None and batch.prefix.prefix_rows.tolist() == [0, 1, 2, 21]
    whole = dataclasses.replace(batch, prefix=None)
    decoder, z, expected_z = tiny_decoder(**parts), _vectors(batch), _vectors(batch)
    expected = decoder(whole, expected_z)
    expected.sum().backward()
    decoder = tiny_decoder(**parts, activation_checkpointing=recompute)
    nll = decoder(batch if split else whole, z)
    nll.sum().backward()
    assert expected_z.grad.abs().max() > 1e-2
    assert torch.allclose(nll, expected, rtol=0, atol=EXACT)
    assert torch.allclose(z.grad, expected_z.grad, rtol=0, atol=EXACT)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_prefix_runs_once_and_keeps_no_graph(monkeypatch: pytest.MonkeyPatch, recompute: Recompute) -> None:
    """Backward needs only the keys and values of the prefix. If layers are recomputed, the suffix runs twice."""
    decoder, batch = tiny_decoder(activation_checkpointing=recompute), pack([sample(3, -9, 4)], SPEC)
    seen: list[tuple[int, bool]] = []
    attend = Attention.attend

    def spy(self: Any, q_TNH: Tensor, *args: Any) -> Tensor:
        seen.append((q_TNH.shape[0], torch.is_grad_enabled()))
        return attend(self, q_TNH, *args)

    monkeypatch.setattr(Attention, "attend", spy)
    decoder(batch, _vectors(batch)).sum().backward()
    one_layer = [(3, False), (batch.num_decoder_rows - 3, True)]
    assert seen == one_layer * 3 + one_layer[1:] * (3 if recompute == "full" else 0)


def test_what_a_layer_adds_last_is_summed_by_the_next_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Mock()
    for name in ("rms_norm", "add_rms_norm"):
        calls.attach_mock(Mock(wraps=getattr(ak, name)), name)
        monkeypatch.setattr(ak, name, getattr(calls, name))
    decoder = tiny_decoder()
    decoder(pack([sample(6)], SPEC), None)
    names = [name for name, *_ in calls.mock_calls]
    assert names == ["rms_norm", *["add_rms_norm"] * (2 * len(decoder.layers) - 1), "rms_norm"]


@pytest.mark.parametrize("sizes", [(-9, 5), (4, -9, 5)], ids=["whole", "prefix and suffix"])
def test_a_layer_that_is_recomputed_keeps_its_input_as_one_tensor(sizes: tuple[int, ...]) -> None:
    decoder, batch = tiny_decoder(activation_checkpointing="full"), pack([sample(*sizes)], SPEC)
    kept: list[tuple[int, ...]] = []
    z = _vectors(batch)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        decoder.hidden(batch, z)
    rows = batch.num_decoder_rows if batch.prefix is None else batch.prefix.suffix_rows.numel()
    assert kept.count((rows, decoder.config.hidden_size)) == len(decoder.layers)

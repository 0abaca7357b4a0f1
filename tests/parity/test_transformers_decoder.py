"""Decoders that run through `transformers` against the models themselves, one sequence at a time.

Bounds: losses, gradients and logits agree within 1e-5 of their norm in float32 (worst measured: 1.5e-6, GPT-OSS), and
tokens are equal. Each test also breaks one thing and checks that the difference exceeds the bound.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from arc_ds.batch.packing import PackedBatch
from arc_ds.batch.segments import TokenIds
from arc_ds.errors import WeightsError
from arc_ds.inference.decoders import NativeFiles, open_decoder
from arc_ds.inference.generate import Sampling
from arc_ds.inference.reader import DecoderReader
from arc_ds.model.frozen_decoder import FrozenDecoder
from arc_ds.model.spec import CompressorSpec
from arc_ds.model.transformers_decoder import TransformersDecoder, find_reading
from arc_ds.model.transformers_files import open_with_transformers
from arc_ds.planning.flops import count_flops, work_rates
from tests.helpers.generation import generate_ids

pytest.importorskip("transformers")
from tests.helpers.transformers_generate import continue_prompts
from tests.helpers.transformers_models import (
    VOCAB,
    mixed_batch,
    parameter_hash,
    random_vectors,
    text_batch,
    write_model,
)

CPU = torch.device("cpu")
BOUND = 1e-5
PACKED = ("Llama", "Gemma3Text", "GPTNeoX", "Cohere")
PADDED = ("Gemma2", "GptOss", "FalconH1", "Mamba", "Mamba2", "OPT")


def load(folder: Path, *, recomputed: bool = False) -> TransformersDecoder:
    return open_with_transformers(folder, activation_checkpointing=recomputed).load(CPU, torch.float32)


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).detach().norm() / theirs.detach().norm())


def own_step(model: Any, family: str, batch: PackedBatch, z_ZD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """NLL, gradient of the compressed vectors, and logits of the last rows, by the model itself on each sequence."""
    z_ZD = z_ZD.detach().clone().requires_grad_()
    # Falcon-H1 multiplies the embeddings of ids outside its embedding module.
    embedded = model.get_input_embeddings()(batch.decoder_ids) * (3.0 if family == "FalconH1" else 1.0)
    x_RD = torch.empty(batch.num_decoder_rows, z_ZD.shape[1])
    x_RD = x_RD.index_copy(0, batch.text_rows, embedded.detach()).index_copy(0, batch.compressed_rows, z_ZD)
    lengths = batch.decoder_cu_seqlens.diff().tolist()
    logits = torch.cat([model(inputs_embeds=rows[None], use_cache=False).logits[0] for rows in x_RD.split(lengths)])
    nll = functional.cross_entropy(logits[batch.label_rows].float(), batch.labels, reduction="none")
    (grad,) = torch.autograd.grad(nll.mean(), z_ZD)
    return nll.detach(), grad, logits[batch.decoder_cu_seqlens[1:].long() - 1].detach()


def our_step(decoder: FrozenDecoder, batch: PackedBatch, z_ZD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    z_ZD = z_ZD.detach().clone().requires_grad_()
    nll = decoder(batch, z_ZD)
    (grad,) = torch.autograd.grad(nll.mean(), z_ZD)
    return nll.detach(), grad, decoder.logits(batch, z_ZD, batch.decoder_cu_seqlens[1:].long() - 1).detach()


@pytest.mark.parametrize("family", [*PACKED, *PADDED])
def test_losses_and_gradients_are_those_of_separate_sequences(family: str, tmp_path: Path) -> None:
    model = write_model(tmp_path, family)
    decoder = load(tmp_path)
    assert decoder.reading.is_packed == (family in PACKED), decoder.reading
    before = parameter_hash(decoder)
    batch = mixed_batch()
    z_ZD = random_vectors(batch, decoder.hidden_size)
    wanted = own_step(model, family, batch, z_ZD)
    readings = {decoder.reading, dataclasses.replace(decoder.reading, is_packed=False)}
    for reading in readings:
        decoder.reading = reading
        for ours, theirs in zip(our_step(decoder, batch, z_ZD), wanted, strict=True):
            assert distance(ours, theirs) < BOUND and float(theirs.norm()) > 1e-2, reading
    assert parameter_hash(decoder) == before
    assert not decoder.training and not any(parameter.requires_grad for parameter in decoder.parameters())
    if family in PACKED:  # wrong: positions that do not restart, so sequences see each other
        decoder.reading = dataclasses.replace(decoder.reading, is_packed=True)
        batch = dataclasses.replace(batch, decoder_positions=torch.arange(batch.num_decoder_rows))
    else:  # wrong: rows one place off
        batch = dataclasses.replace(batch, label_rows=batch.label_rows - 1)
    errors = [distance(ours, theirs) for ours, theirs in zip(our_step(decoder, batch, z_ZD)[:2], wanted, strict=False)]
    assert min(errors) > 1e3 * BOUND, errors


@pytest.mark.parametrize("family", ["FalconH1", "OPT"])
def test_packing_would_leak_where_it_is_not_chosen(family: str, tmp_path: Path) -> None:
    model = write_model(tmp_path, family)
    decoder, batch = load(tmp_path), mixed_batch()
    decoder.reading = dataclasses.replace(decoder.reading, is_packed=True)
    z_ZD = random_vectors(batch, decoder.hidden_size)
    assert distance(our_step(decoder, batch, z_ZD)[0], own_step(model, family, batch, z_ZD)[0]) > 1e2 * BOUND


@pytest.mark.parametrize("family", ["GPTNeoX", "OPT", "GptOss"])
def test_recomputed_layers_have_the_same_gradients_and_keep_less(family: str, tmp_path: Path) -> None:
    model = write_model(tmp_path, family)  # OPT has dropout, which training mode would apply
    batch, saved = mixed_batch(), {}
    wanted = own_step(model, family, batch, random_vectors(batch, load(tmp_path).hidden_size))
    for recomputed in (False, True):
        decoder, num_values = load(tmp_path, recomputed=recomputed), 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal num_values
            num_values += tensor.numel()
            return tensor

        z_ZD = random_vectors(batch, decoder.hidden_size)
        for ours, theirs in zip(our_step(decoder, batch, z_ZD), wanted, strict=True):
            assert distance(ours, theirs) < BOUND
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            decoder(batch, z_ZD)
        saved[recomputed] = num_values
    assert saved[True] < 0.5 * saved[False], saved


PROMPTS = [[5, 17, 80, 33, 9], [61, 2, 44, 7, 7, 90, 12, 51, 30, 8, 25], [70, 41]]


@pytest.mark.parametrize("family", [*PACKED, *PADDED])
def test_ragged_prompts_continue_with_the_models_own_tokens(family: str, tmp_path: Path) -> None:
    # A tied head with large random weights repeats the last token.
    model = write_model(tmp_path, family, initializer_range=0.6, tie_word_embeddings=False)
    decoder = load(tmp_path)
    ours = generate_ids(decoder, text_batch(PROMPTS), None, max_new_tokens=32)
    assert ours == continue_prompts(model, PROMPTS, 32)
    assert len({*itertools.chain(*ours)}) > 3, "a repeated single token would prove little"
    stop = ours[1][10]
    stopped = generate_ids(decoder, text_batch(PROMPTS), None, max_new_tokens=32, stop_ids=[stop])
    assert stopped == [line[: line.index(stop)] if stop in line else line for line in ours] != ours


def test_ended_sequences_stay_in_the_batch_and_change_no_token(tmp_path: Path) -> None:
    """A cache of transformers drops no sequences and shares no rows, so the path is slower."""
    model = write_model(tmp_path, "Gemma2", initializer_range=0.6, tie_word_embeddings=False)
    reader, shared = DecoderReader(decoder=load(tmp_path)), [3, 9, 27, 81, 4, 12] * 6
    prompts, limits = [[*shared, *ids] for ids in PROMPTS], [2, 9, 5]
    lines = reader.continue_rows([[TokenIds(ids)] for ids in prompts], max_new_tokens=limits)
    expected = continue_prompts(model, prompts, 9)
    assert [line.ids for line in lines] == [ids[:limit] for ids, limit in zip(expected, limits, strict=True)]
    assert [line.stop for line in lines] == ["length"] * 3
    (nats, num), *_ = reader.nll_rows([[TokenIds(ids)] for ids in prompts], [TokenIds(ids[:4]) for ids in expected])
    logits = model(torch.tensor([[*prompts[0], *expected[0][:4]]])).logits[0].float().log_softmax(dim=-1)
    places = torch.arange(4) + len(prompts[0]) - 1
    assert num == 4 and nats == pytest.approx(-float(logits[places, expected[0][:4]].sum()), rel=1e-4)


def test_a_model_that_sees_padding_takes_prompts_of_one_length_at_once(tmp_path: Path) -> None:
    model = write_model(tmp_path, "Rwkv")
    decoder = load(tmp_path)
    with pytest.raises(WeightsError, match="cannot generate from prompts of different lengths at once. Give it one"):
        generate_ids(decoder, text_batch(PROMPTS), None, max_new_tokens=2)
    ours = [generate_ids(decoder, text_batch([ids]), None, max_new_tokens=8)[0] for ids in PROMPTS]  # the remedy
    assert ours == continue_prompts(model, PROMPTS, 8)


def test_packing_is_not_chosen_for_a_small_leak_or_for_other_logits(tmp_path: Path) -> None:
    write_model(tmp_path, "Llama")
    decoder = load(tmp_path)

    def leak(_module: Any, args: Any, given: dict[str, Any]) -> Any:
        if "inputs_embeds" in given:  # of all rows before, below the rounding of logits
            given["inputs_embeds"] = given["inputs_embeds"] + 3e-7 * given["inputs_embeds"].cumsum(1)
        return args, given

    def scale(_module: Any, args: Any, given: dict[str, Any]) -> Any:
        if given.get("position_ids") is not None:
            given["inputs_embeds"] = given["inputs_embeds"] * torch.linspace(0.5, 2, 32)
        return args, given

    assert find_reading(decoder).is_packed
    for hook in (leak, scale):
        handle = decoder.model.register_forward_pre_hook(hook, with_kwargs=True)
        reading = find_reading(decoder)
        assert not reading.is_packed and "depend on their neighbours" in reading.reason, hook
        handle.remove()


def test_prompts_with_vectors_sampling_and_callbacks_work_as_with_the_native_decoder(tmp_path: Path) -> None:
    write_model(tmp_path, "Llama", initializer_range=0.6)
    ours, native = load(tmp_path), open_decoder(tmp_path, "checkpoint").load(CPU, torch.float32)
    batch = mixed_batch()
    z_ZD = random_vectors(batch, ours.hidden_size).detach()
    for options in (
        {},
        {"sampling": Sampling(temperature=1.3, top_p=0.9, seed=4)},
        {"has_ended": lambda _idx, line: len(line) == 3},
    ):
        lines = [generate_ids(d, batch, z_ZD, max_new_tokens=16, **options) for d in (ours, native)]
        assert lines[0] == lines[1] and len({*itertools.chain(*lines[0])}) > 3
    other = generate_ids(ours, batch, -z_ZD, max_new_tokens=16)
    assert other[:3] != generate_ids(ours, batch, z_ZD, max_new_tokens=16)[:3]


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Granite"])
def test_a_native_family_through_transformers_has_the_native_losses(family: str, tmp_path: Path) -> None:
    write_model(tmp_path, family)
    opened = open_decoder(tmp_path, "checkpoint")
    assert isinstance(opened, NativeFiles)
    native = opened.load(CPU, torch.float32)
    through = open_decoder(tmp_path, "checkpoint", implementation="transformers").load(CPU, torch.float32)
    batch = mixed_batch()
    z_ZD = random_vectors(batch, native.hidden_size)
    for ours, theirs in zip(our_step(through, batch, z_ZD), our_step(native, batch, z_ZD), strict=True):
        assert distance(ours, theirs) < BOUND
    assert torch.equal(through.embed(batch, z_ZD), native.embed(batch, z_ZD))
    assert (through.hidden_size, through.vocab_size) == (native.hidden_size, native.vocab_size) == (32, VOCAB)
    assert through.cache_row_bytes == native.cache_row_bytes


def test_a_micro_batch_without_labels_has_no_loss_and_no_gradient(tmp_path: Path) -> None:
    write_model(tmp_path, "GPTNeoX")
    batch = mixed_batch()
    empty = dataclasses.replace(batch, label_rows=batch.label_rows[:0], labels=batch.labels[:0])
    z_ZD = random_vectors(batch, 32)
    nll = load(tmp_path)(empty, z_ZD)
    nll.sum().backward()
    assert nll.shape == (0,) and float(z_ZD.grad.abs().max()) == 0


def test_the_estimated_operations_of_a_dense_model_are_near_those_that_torch_counts(tmp_path: Path) -> None:
    write_model(tmp_path, "Llama", hidden_size=64, intermediate_size=128)
    through = load(tmp_path)
    native = open_decoder(tmp_path, "checkpoint").load(CPU, torch.float32)
    spec = CompressorSpec(backbone=native.sizes, num_layers=1, decoder_sizes=(64,))
    batch = dataclasses.replace(mixed_batch(), prefix=None)
    estimated, counted = (count_flops(batch, spec, decoder.sizes) for decoder in (through, native))
    for part in ("decoder_forward", "decoder_backward"):
        ours, theirs = getattr(estimated, part), getattr(counted, part)
        assert ours.linear == pytest.approx(theirs.linear, rel=0.01)  # norms count as products
        assert ours.attention == theirs.attention > 0
    assert (estimated.head, estimated.bridge) == (counted.head, counted.bridge)
    ours, theirs = (work_rates(spec, decoder.sizes) for decoder in (through, native))
    assert ours.suffix_row == pytest.approx(theirs.suffix_row, rel=0.01) and ours.decoder_pair == theirs.decoder_pair


def test_models_that_cannot_read_vectors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "bert", "Bert")
    with pytest.raises(WeightsError, match="BertLMHeadModel of transformers .* it is not causal. Use a causal"):
        load(tmp_path / "bert")
    write_model(tmp_path / "neox", "GPTNeoX")
    files = open_with_transformers(tmp_path / "neox")
    monkeypatch.setattr(TransformersDecoder, "_embed_ids", lambda self, ids: torch.ones(*ids.shape, 32))
    with pytest.raises(WeightsError, match="other logits from the embeddings of a text than from its ids"):
        files.load(CPU, torch.float32)

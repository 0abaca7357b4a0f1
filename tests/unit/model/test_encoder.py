"""The encoder: visibility between tokens, and independence of packing. Tiny random weights in float64."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from arc_ds.batch.groups import GroupRule
from arc_ds.batch.packing import PackedBatch, PoolingSpec, pack
from arc_ds.batch.segments import Sample, Segment
from arc_ds.model.backbone import Recompute
from arc_ds.model.encoder import Encoder, group_ends
from arc_ds.model.pooling import group_rules
from tests.helpers.tiny_compressor import MANY_PARTS, OUTPUT_NORMED, TINY, fill, sample, tiny_compressor

EXACT = 2e-13  # measured worst 2e-14; states are of order ten
LENGTHS = (9, 1, 4, 6)

OUTPUT_NORMS = dataclasses.replace(TINY, **OUTPUT_NORMED)
ALL_PARTS = dataclasses.replace(TINY, **MANY_PARTS)

POOLINGS = [
    {"strategy": strategy, "pooled_queries": pooled_queries, "where": where, "rules": group_rules(strategy, [4])}
    for strategy, (pooled_queries, where) in itertools.product(
        ("mean", "last", "sum", "fusion", "kmeans", "similarity", "prune_norm"),
        ((True, "before"), (False, "before"), (True, "between")),
    )
]
ENCODERS: list[dict[str, Any]] = [
    *POOLINGS,
    *({"causal": True, **pooling} for pooling in POOLINGS[:3]),
    {"rules": (GroupRule("factor", 2), GroupRule("factor", 2))},
    {"rules": (GroupRule("count", 2),)},
    {"rules": ()},
    {"where": "after"},
    {"where": "after", "strategy": "last", "causal": True, "backbone": OUTPUT_NORMS},
    {"rules": (), "memory_tokens": 3},
    {"rules": (), "memory_tokens": 3, "causal": True},
    {"backbone": dataclasses.replace(TINY, norm="layer")},
    *({"backbone": OUTPUT_NORMS, **pooling} for pooling in POOLINGS[:3]),
    *({"backbone": ALL_PARTS, "causal": True, **pooling} for pooling in POOLINGS[:3]),
    {"backbone": ALL_PARTS, "rules": (GroupRule("factor", 2), GroupRule("factor", 2))},
    {"backbone": ALL_PARTS, "rules": (), "memory_tokens": 3},
]


@pytest.mark.parametrize("changes", ENCODERS, ids=lambda c: "-".join(str(v) for v in c.values())[:60])
def test_a_pack_of_contexts_gives_what_each_gives_alone(changes: dict[str, Any]) -> None:
    encoder, spec = _encoder(**changes)
    contexts = [sample(-length, seed=length) for length in LENGTHS]
    whole = encoder(pack(contexts, spec))
    alone = torch.cat([encoder(pack([one], spec)) for one in contexts])
    assert whole.shape[0] == alone.shape[0] > 0
    assert torch.allclose(whole, alone, rtol=0, atol=EXACT)
    assert (whole - encoder(pack(contexts[::-1], spec))).abs().max() > 0.1


def test_every_token_reaches_every_group_of_its_context_in_both_directions() -> None:
    encoder, spec = _encoder()
    changed = _change_of_each_group(encoder, spec, length=12)
    assert (changed > 1e-6).all()


@pytest.mark.parametrize("pooled_queries", [True, False])
@pytest.mark.parametrize("rule", [GroupRule("factor", 4), GroupRule("count", 3)])
def test_a_causal_group_sees_all_up_to_its_own_end_and_nothing_later(pooled_queries: bool, rule: GroupRule) -> None:
    encoder, spec = _encoder(causal=True, pooled_queries=pooled_queries, rules=(rule,))
    changed = _change_of_each_group(encoder, spec, length=11)
    group_of_token = [0] * 4 + [1] * 4 + [2] * 3  # balanced: 11 at 4, or in 3 groups
    for token, group in enumerate(group_of_token):
        assert not changed[token, :group].any(), f"token {token} reached a group before its own"
        assert (changed[token, group:] > 1e-6).all(), f"token {token} did not reach group {group} or a later one"


def test_a_window_hides_what_is_before_it_in_a_causal_encoder_only() -> None:
    """Two layers with a window of 3: a row sees 5 rows. The third layer pools groups of one and mixes no rows."""
    windowed = dataclasses.replace(TINY, window=3, windowed_layers=(0, 1))
    encoder, spec = _encoder(backbone=windowed, causal=True, rules=(GroupRule("factor", 1),), num_layers=3)
    encoder.layers[2].attention.wv.weight.data.zero_()
    changed = _change_of_each_group(encoder, spec, length=9)
    seen = [[token <= row < token + 5 for row in range(9)] for token in range(9)]
    assert torch.equal(changed > 1e-9, torch.tensor(seen))
    both_ways, spec = _encoder(backbone=windowed)
    plain, _ = _encoder()
    batch = pack([sample(-9)], spec)
    assert torch.equal(both_ways(batch), plain(batch))


@pytest.mark.parametrize("causal", [True, False])
def test_layers_that_pool_groups_of_one_are_plain_layers(causal: bool) -> None:
    """Each layer keeps its own rotary positions and window."""
    one, contexts = GroupRule("factor", 1), [sample(-9), sample(-4, seed=1)]
    changes: dict[str, Any] = {"backbone": dataclasses.replace(ALL_PARTS, layers_without_rope=(1,)), "causal": causal}
    pooled, spec = _encoder(**changes, rules=(one, one))
    plain, plain_spec = _encoder(**changes, rules=())
    expected = plain(pack(contexts, plain_spec))
    assert torch.allclose(pooled(pack(contexts, spec)), expected, rtol=0, atol=EXACT)
    other, _ = _encoder(backbone=ALL_PARTS, causal=causal, rules=(one, one))
    assert (other(pack(contexts, spec)) - expected).abs().max() > 0.01


def test_ends_of_groups_count_from_the_start_of_their_context() -> None:
    batch = pack([sample(-10), sample(-3), sample(-5)], PoolingSpec((GroupRule("factor", 4),)))
    ends = group_ends(batch.encoder_cu_seqlens, batch.levels[0])
    assert ends.tolist() == [4, 7, 10, 3, 3, 5]
    assert ends.dtype == torch.int32


def test_two_levels_pool_in_the_last_two_layers() -> None:
    encoder, spec = _encoder(rules=(GroupRule("factor", 2), GroupRule("factor", 3)))
    rows: list[int] = []
    for layer in encoder.layers:
        layer.register_forward_hook(lambda module, args, output: rows.append(output.total_TD.shape[0]))
    encoder(pack([sample(-12), sample(-5)], spec))
    assert rows == [17, 6 + 3, 2 + 1]


@pytest.mark.parametrize(("strategy", "causal"), [("mean", False), ("last", True)])
def test_one_group_after_the_layer_is_the_embedding_of_a_retriever(strategy: str, causal: bool) -> None:
    """The mean of the last states after a final norm, or the last of them."""
    plain, plain_spec = _encoder(rules=(), causal=causal)
    pooled, spec = _encoder(where="after", strategy=strategy, rules=(GroupRule("count", 1),), causal=causal)
    contexts = [sample(-9), sample(-4, seed=1)]
    states = plain(pack(contexts, plain_spec))
    normed = states / (states.square().mean(-1, keepdim=True) + TINY.norm_eps).sqrt()
    of_each = normed[:9], normed[9:]
    expected = torch.stack([x.mean(0) if strategy == "mean" else x[-1] for x in of_each])
    assert torch.allclose(pooled(pack(contexts, spec)), expected, rtol=0, atol=EXACT)
    before, _ = _encoder(strategy=strategy, rules=(GroupRule("count", 1),), causal=causal)
    assert (before(pack(contexts, spec)) - expected).abs().max() > 0.1


def test_only_the_outputs_of_the_memory_tokens_are_kept_and_they_read_the_context() -> None:
    encoder, spec = _encoder(rules=(), memory_tokens=3)
    before = encoder(pack([sample(-9, seed=1), sample(-4)], spec))
    after = encoder(pack([sample(-9, seed=2), sample(-4)], spec))
    assert before.shape == (6, TINY.hidden_size)
    assert (before[:3] - after[:3]).abs().min() > 1e-6 and torch.equal(before[3:], after[3:])
    before.sum().backward()
    assert encoder.memory.grad.abs().min() > 0


def test_truncated_layers_norm_and_head_are_not_there() -> None:
    encoder, _ = _encoder(num_layers=2)
    names = {name.split(".")[0] for name, _ in encoder.named_parameters()}
    assert len(encoder.layers) == 2 and names == {"tok_embeddings", "layers"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"strategy": "similarity"},
        {"where": "between"},
        {"where": "after"},
        {"memory_tokens": 2, "rules": ()},
        {"backbone": OUTPUT_NORMS, "where": "between"},
        {"backbone": ALL_PARTS, "causal": True},
    ],
)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_activation_checkpointing_changes_no_gradient(changes: dict[str, Any], recompute: Recompute) -> None:
    plain, spec = _encoder(**changes)
    recomputed, _ = _encoder(**changes, activation_checkpointing=recompute)
    batch = pack([sample(-9), sample(-4, seed=1)], spec)
    for encoder in (plain, recomputed):
        encoder(batch).square().sum().backward()
    for (name, one), (_, other) in zip(plain.named_parameters(), recomputed.named_parameters(), strict=True):
        assert one.grad is not None and one.grad.abs().max() > 0, name
        if recompute == "full":
            assert torch.equal(one.grad, other.grad), name
        else:  # the residual's gradients are added in another order
            assert (one.grad - other.grad).abs().max() <= 1e-13 * one.grad.abs().max(), name


def test_a_batch_without_contexts_gives_no_rows() -> None:
    for changes in ({}, {"strategy": "kmeans"}, {"memory_tokens": 2, "rules": ()}):
        encoder, spec = _encoder(**changes)
        assert encoder(pack([Sample("t", (Segment.text([1, 2]),))], spec)).shape == (0, TINY.hidden_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 4}, "the backbone has 3 layers"),
        ({"num_layers": 1, "rules": (GroupRule("factor", 2),) * 2}, "2 layers must pool but only 1"),
        ({"causal": True, "strategy": "kmeans"}, "contiguous groups"),
        ({"where": "after", "rules": (GroupRule("factor", 2),) * 2}, "for the last layer only"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _encoder(**changes)


def test_a_batch_packed_for_another_encoder_is_refused() -> None:
    encoder, _ = _encoder()
    with pytest.raises(ValueError, match="packed for 0 pooled layers, but the encoder has 1"):
        encoder(pack([sample(-4)], PoolingSpec(())))


def _encoder(**changes: Any) -> tuple[Encoder, PoolingSpec]:
    compressor = tiny_compressor(**changes)
    spec = PoolingSpec(changes.get("rules", (GroupRule("factor", 4),)), changes.get("memory_tokens", 0))
    return fill(compressor.encoder, seed=0), spec


def _change_of_each_group(encoder: Encoder, spec: PoolingSpec, length: int) -> Tensor:
    """Change of each group (second axis) if one token (first axis) of the middle one of three contexts changes."""
    batch = pack([sample(-5), sample(-length, seed=7), sample(-6)], spec)
    before = _middle(encoder(batch), batch)
    rows = []
    for token in range(length):
        ids = batch.encoder_ids.clone()
        ids[5 + token] = (ids[5 + token] + 1) % TINY.vocab_size
        after = _middle(encoder(dataclasses.replace(batch, encoder_ids=ids)), batch)
        rows.append((after - before).abs().amax(dim=1))
    return torch.stack(rows).detach()


def _middle(states: Tensor, batch: PackedBatch) -> Tensor:
    start, end = batch.levels[-1].cu_seqlens[1:3].tolist()
    return states[start:end]

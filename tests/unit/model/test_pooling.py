"""Pooling strategies against plain loops over contexts and rounds, in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arc_ds.batch.groups import GroupRule
from arc_ds.batch.packing import PoolingSpec, PoolLevel, pack
from arc_ds.batch.segments import Sample, Segment
from arc_ds.model.backbone import RMSNorm, Spans
from arc_ds.model.pooling import STRATEGIES, Pooling, get_strategy, group_rules
from arc_ds.model.pooling.merging import SIMILARITIES

WIDTH = 5
EXACT = 1e-14  # measured worst 5e-16
LENGTHS = [[1], [9], [12, 1, 3, 5, 8], [2, 2], [30, 4]]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("metric", SIMILARITIES)
def test_merging_equals_merging_one_pair_at_a_time(metric: str, prune: bool, lengths: list[int]) -> None:
    name = f"{'prune' if prune else 'similarity'}_{metric}"
    _compare(name, lengths, 4, lambda x, m: _merge_by_hand(x, m, metric, prune=prune))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_norm_pruning_keeps_the_largest_norms_in_their_order(lengths: list[int]) -> None:
    _compare("prune_norm", lengths, 4, lambda x, m: x[x.norm(dim=-1).topk(m).indices.sort().values])


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_kmeans_equals_lloyd_on_each_context_alone(metric: str, lengths: list[int]) -> None:
    _compare(f"kmeans_{metric}", lengths, 4, lambda x, m: _lloyd_by_hand(x, m, metric))


def test_a_cluster_without_rows_is_its_balanced_group() -> None:
    x = torch.ones(6, WIDTH, dtype=torch.float64, requires_grad=True)
    _, spans, level = _batch([6], GroupRule("count", 3))
    pooled = get_strategy("kmeans").pool(x, spans, level)
    assert torch.allclose(pooled, torch.ones(3, WIDTH, dtype=torch.float64), rtol=0, atol=EXACT)
    (grad,) = torch.autograd.grad(pooled.sum(), x)
    assert torch.isfinite(grad).all() and grad.sum() == pytest.approx(pooled.numel())


@settings(max_examples=40)
@given(st.lists(st.integers(1, 14), min_size=1, max_size=4), st.sampled_from(list(STRATEGIES)), st.integers(1, 6))
def test_a_context_is_pooled_as_if_it_were_alone(lengths: list[int], name: str, factor: int) -> None:
    (rule,) = group_rules(name, [factor])
    strategy = get_strategy(name)
    x, spans, level = _batch(lengths, rule)
    whole = strategy.pool(x, spans, level)
    parts = []
    for own, length in zip(x.split(lengths), lengths, strict=True):
        _, own_spans, own_level = _batch([length], rule)
        parts.append(strategy.pool(own, own_spans, own_level))
    assert whole.shape == (level.positions.numel(), WIDTH)
    assert torch.allclose(whole, torch.cat(parts), rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", STRATEGIES)
def test_pool_norm_is_pooling_and_the_norm_of_both(name: str) -> None:
    x, spans, level = _batch([9, 3], group_rules(name, [4])[0])
    norm = RMSNorm(WIDTH, 1e-5).double()
    norm.weight.data = torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64)
    out = get_strategy(name).pool_norm(x, spans, level, norm)
    pooled = get_strategy(name).pool(x, spans, level)
    assert torch.equal(out.pooled_GD, pooled)
    assert torch.equal(out.normed_pooled_GD, norm(pooled)) and torch.equal(out.normed_TD, norm(x))


@pytest.mark.parametrize("name", STRATEGIES)
def test_rows_keep_their_dtype_and_a_batch_without_contexts_is_empty(name: str) -> None:
    rule = group_rules(name, [4])[0]
    x, spans, level = _batch([9, 3], rule)
    assert get_strategy(name).pool(x.bfloat16(), spans, level).dtype == torch.bfloat16
    x, spans, level = _batch([], rule)
    assert get_strategy(name).pool(x, spans, level).shape == (0, WIDTH)


def test_merging_does_not_ask_for_the_lengths_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    x, spans, level = _batch([9, 3], GroupRule("floor_factor", 4))
    monkeypatch.setenv("ARC_KERNELS_CHECK", "0")  # on the CPU, boundaries are checked, because this needs no sync

    def refuse(*args: object) -> None:
        raise AssertionError("a value was read on the host")

    for reader in ("item", "tolist", "__bool__", "__int__", "__index__"):
        monkeypatch.setattr(Tensor, reader, refuse)
    for name in ("similarity", "prune", "prune_norm", "kmeans"):
        get_strategy(name).pool(x, spans, level)


def test_group_rules_of_each_kind() -> None:
    assert group_rules("mean", [2, 4]) == (GroupRule("factor", 2), GroupRule("factor", 4))
    assert group_rules("kmeans_cosine", [8]) == (GroupRule("factor", 8),)
    assert group_rules("similarity", [8]) == group_rules("prune_norm", [8]) == (GroupRule("floor_factor", 8),)
    assert group_rules("similarity", [], 16) == group_rules("mean", [], 16) == (GroupRule("count", 16),)


@pytest.mark.parametrize("name", ["median", "kmeans_dot"])
def test_unknown_names_are_refused(name: str) -> None:
    for call in (lambda: get_strategy(name), lambda: group_rules(name, [8])):
        with pytest.raises(ValueError, match=f"'{name}'; expected one of mean, last"):
            call()


def _compare(name: str, lengths: list[int], factor: int, by_hand: Callable[[Tensor, int], Tensor]) -> None:
    """Check that pooled rows and gradients equal `by_hand(rows of a context, number of groups)` on each context."""
    (rule,) = group_rules(name, [factor])
    strategy: Pooling = get_strategy(name)
    assert not strategy.contiguous
    x, spans, level = _batch(lengths, rule)
    ours = strategy.pool(x, spans, level)
    counts = rule.num_groups(np.array(lengths)).tolist()
    expected = torch.cat([by_hand(own, count) for own, count in zip(x.split(lengths), counts, strict=True)])
    assert torch.allclose(ours, expected, rtol=0, atol=EXACT)
    towards = torch.linspace(-1, 2, ours.numel(), dtype=torch.float64).view(ours.shape)
    (got,) = torch.autograd.grad((ours * towards).sum(), x)
    (wanted,) = torch.autograd.grad((expected * towards).sum(), x)
    assert wanted.abs().max() > 0
    assert torch.allclose(got, wanted, rtol=0, atol=EXACT)


def _merge_by_hand(x: Tensor, count: int, metric: str, *, prune: bool) -> Tensor:
    rows = list(x)
    while len(rows) > count:
        alike = [SIMILARITIES[metric](a[None], b[None]).item() for a, b in pairwise(rows)]
        at = alike.index(max(alike))
        rows[at : at + 2] = [rows[at + 1] if prune else (rows[at] + rows[at + 1]) / 2]
    return torch.stack(rows)


def _lloyd_by_hand(x: Tensor, count: int, metric: str) -> Tensor:
    def features(rows: Tensor) -> Tensor:
        return rows / rows.norm(dim=-1, keepdim=True) if metric == "cosine" else rows

    sizes = [len(part) for part in np.array_split(np.arange(len(x)), count)]
    balanced = [group.mean(0) for group in x.split(sizes)]
    rows, centres = features(x.detach()), features(torch.stack(balanced).detach())
    for _ in range(10):
        nearest = torch.cdist(rows, centres).argmin(dim=1)
        centres = torch.stack(
            [features(rows[nearest == c].mean(0)) if (nearest == c).any() else centres[c] for c in range(count)]
        )
    nearest = torch.cdist(rows, centres).argmin(dim=1)
    return torch.stack([x[nearest == c].mean(0) if (nearest == c).any() else balanced[c] for c in range(count)])


def _batch(lengths: list[int], rule: GroupRule) -> tuple[Tensor, Spans, PoolLevel]:
    """Random rows of contexts of the given lengths, their spans and the level of the rule."""
    contexts = tuple(Segment.context(range(length)) for length in lengths)
    batch = pack([Sample("t", contexts)], PoolingSpec((rule,)))
    generator = torch.Generator().manual_seed(len(lengths) + sum(lengths))
    x = torch.randn(sum(lengths), WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    spans = Spans.within(batch.encoder_cu_seqlens, batch.encoder_max_seqlen, causal=False)
    return x, spans, batch.levels[0]

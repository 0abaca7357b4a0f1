"""Group arithmetic: how the tokens of a context become balanced groups."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arc_ds.batch.groups import GroupRule, group_sizes

LENGTHS = st.lists(st.integers(1, 300), min_size=0, max_size=8)
RULES = st.one_of(
    st.builds(GroupRule, st.sampled_from(["factor", "count", "floor_factor"]), st.integers(1, 40)),
    st.just(GroupRule("none")),
)


def _sizes(length: int, rule: GroupRule) -> list[int]:
    return group_sizes(np.array([length]), rule)[0].tolist()


@pytest.mark.parametrize(
    ("length", "rule", "sizes"),
    [
        (10, GroupRule("factor", 4), [4, 3, 3]),
        (17, GroupRule("factor", 8), [6, 6, 5]),
        (3, GroupRule("factor", 8), [3]),
        (10, GroupRule("count", 4), [3, 3, 2, 2]),
        (3, GroupRule("count", 4), [1, 1, 1]),
        (3, GroupRule("none"), [1, 1, 1]),
        (11, GroupRule("floor_factor", 4), [6, 5]),
        (3, GroupRule("floor_factor", 4), [1, 1, 1]),
        (3, GroupRule("factor", 10**30), [3]),
        (3, GroupRule("count", 10**30), [1, 1, 1]),
        (3, GroupRule("floor_factor", 10**30), [1, 1, 1]),
    ],
)
def test_groups_are_balanced_and_the_longer_come_first(length: int, rule: GroupRule, sizes: list[int]) -> None:
    assert _sizes(length, rule) == sizes


@given(LENGTHS, RULES)
def test_groups_cover_every_context_and_differ_by_one_at_most(lengths: list[int], rule: GroupRule) -> None:
    sizes, counts = group_sizes(np.array(lengths, dtype=np.int64), rule)
    start = 0
    for length, count in zip(lengths, counts.tolist(), strict=True):
        own = sizes[start : start + count].tolist()
        start += count
        assert sum(own) == length and count >= 1
        assert own == sorted(own, reverse=True) and own[0] - own[-1] <= 1
    assert start == len(sizes)


def test_group_sizes_are_the_golden_tables(golden: Path) -> None:
    table = json.loads((golden / "tables" / "split_integer.json").read_text(encoding="utf-8"))
    rates = [rate for rate in table if int(rate) < -1]
    assert len(rates) >= 4
    for rate in rates:
        for length, sizes in table[rate].items():
            assert _sizes(int(length), GroupRule("factor", -int(rate))) == sizes, (rate, length)


def test_numbers_of_groups_are_the_golden_tables(golden: Path) -> None:
    table = json.loads((golden / "tables" / "pooled_lengths.json").read_text(encoding="utf-8"))
    lengths = np.array(table["segment_lengths"])
    for rate, expected in table["new_seqlens_by_rate"].items():
        rule = _rule_of_rate(int(rate))
        assert rule.num_groups(lengths).tolist() == expected, rate


def _rule_of_rate(rate: int) -> GroupRule:
    if rate == -1:
        return GroupRule("none")
    return GroupRule("factor", -rate) if rate < 0 else GroupRule("count", max(rate, 1))

"""The order: a pure function of seed and position, nothing lost or repeated in an epoch, quotas exact."""

from __future__ import annotations

import pickle
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arc_ds.data.mixture import BLOCK, Mixture
from arc_ds.data.order import RunOrder, SourceShape, WindowShuffle, deal
from arc_ds.data.randomness import permutation, random_words
from arc_ds.errors import ConfigError

SOURCES = (
    SourceShape(shard_sizes=(40, 33, 7, 20), fingerprint="a", weight=0.27),
    SourceShape(shard_sizes=(11, 5), fingerprint="b", weight=0.06),
    SourceShape(shard_sizes=(199,), fingerprint="c", weight=0.67),
)


def make_order(**changes) -> RunOrder:
    given_ones = {"seed": 1, "batch_size": 8, "sources": SOURCES, "num_decoders": 2, "window_shards": 2}
    return RunOrder(**(given_ones | changes))


def test_random_words_are_the_recorded_ones() -> None:
    """A change here would change the order of every run that is resumed."""
    assert random_words(2, 0, "sample", 5).tolist() == [8710512222159081382, 18055850970814257424]
    assert permutation(6, 7, "x").tolist() == [4, 5, 1, 0, 2, 3]


def test_batch_is_the_same_however_it_is_reached() -> None:
    straight = [make_order().batch(step) for step in range(40)]
    order = make_order()
    assert [order.batch(step) for step in reversed(range(40))] == straight[::-1]
    assert pickle.loads(pickle.dumps(order)).batch(23) == straight[23]
    assert [pick.position for batch in straight for pick in batch] == list(range(320))
    assert make_order(seed=2).batch(0) != straight[0]


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32), batch_size=st.integers(1, 40))
def test_epochs_lose_and_repeat_nothing(seed: int, batch_size: int) -> None:
    order = make_order(seed=seed, batch_size=batch_size)
    picks = [pick for step in range(900 // batch_size) for pick in order.batch(step)]
    seen = defaultdict(list)
    for pick in picks:
        seen[pick.source_idx, pick.epoch].append(pick.record_idx)
    for (source_idx, epoch), records in seen.items():
        size = SOURCES[source_idx].num_records
        assert len(set(records)) == len(records)
        if (source_idx, epoch + 1) in seen:
            assert sorted(records) == list(range(size))


def test_epochs_differ_and_mix_shards() -> None:
    shuffle = WindowShuffle((50, 50, 50, 50), 2, (0, 0))
    first, second = ([shuffle.record(epoch, place) for place in range(200)] for epoch in (0, 1))
    assert first != second
    assert first != sorted(first)
    alone = WindowShuffle((50,), 2, (0, 0))
    assert [alone.record(0, place) for place in range(50)] != [alone.record(1, place) for place in range(50)]
    assert len({record // 50 for record in first[:30]}) == 2, "a window mixes its two shards"


@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=6), block=st.integers(0, 600))
def test_every_block_has_its_quota_to_one_sample(weights: list[float], block: int) -> None:
    mixture = Mixture(weights)
    counts = Counter(mixture.at(3, block * BLOCK + place)[0] for place in range(BLOCK))
    for source, weight in enumerate(weights):
        # The weight itself is rounded to 1 / 65,536, which is 1/256 sample in a block.
        assert abs(counts[source] - weight / sum(weights) * BLOCK) < 1 + 1 / 256


def test_mixture_is_exact_over_a_period_and_ranks_count_up() -> None:
    mixture = Mixture([0.27, 0.06, 0.67])
    ranks: dict[int, list[int]] = defaultdict(list)
    for position in range(BLOCK * 300):
        source, rank = mixture.at(0, position)
        ranks[source].append(rank)
    for source, weight in enumerate((0.27, 0.06, 0.67)):
        assert sorted(ranks[source]) == list(range(len(ranks[source])))
        assert abs(sum(rank < weight * BLOCK * 256 for rank in ranks[source]) - weight * BLOCK * 256) <= 1


@pytest.mark.parametrize("weights", [[0.0, 0.0], [-1.0, 2.0], [float("nan")], [1.0, 1e-9]])
def test_unusable_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="weight"):
        Mixture(weights)


def test_zero_weight_source_is_never_drawn() -> None:
    mixture = Mixture([1.0, 0.0, 1.0])
    assert {mixture.at(0, position)[0] for position in range(1000)} == {0, 2}


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_task_share_is_exact_in_each_step_and_over_steps(share: float) -> None:
    order = make_order(reconstruction_share=((0, share),))
    counts = [sum(pick.task == "reconstruction" for pick in order.batch(step)) for step in range(400)]
    assert all(abs(count - share * 8) < 1 for count in counts)
    assert abs(sum(counts) - share * 3200) <= 8


def test_task_share_changes_at_its_step() -> None:
    order = make_order(reconstruction_share=((0, 1.0), (10, 0.0)))
    tasks = [{pick.task for pick in order.batch(step)} for step in (0, 9, 10, 11)]
    assert tasks == [{"reconstruction"}, {"reconstruction"}, {"continuation"}, {"continuation"}]


def test_decoders_take_equal_turns() -> None:
    sampled = [make_order(num_decoders=3).decoder(step) for step in range(300)]
    assert Counter(sampled) == {0: 100, 1: 100, 2: 100}
    assert sampled != [step % 3 for step in range(300)]
    alternate = make_order(num_decoders=3, decoder_schedule="alternate")
    assert [alternate.decoder(step) for step in range(4)] == [0, 1, 2, 0]


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 2},
        {"batch_size": 4},
        {"reconstruction_share": ((0, 0.3),)},
        {"num_decoders": 1},
        {"decoder_schedule": "alternate"},
        {"window_shards": 3},
        {"sources": SOURCES[:2]},
    ],
)
def test_fingerprint_tells_every_other_order(changes: dict) -> None:
    assert make_order().fingerprint == make_order().fingerprint
    assert make_order(**changes).fingerprint != make_order().fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 0},
        {"sources": ()},
        {"sources": (SourceShape(shard_sizes=(0,), fingerprint="x"),)},
        {"reconstruction_share": ()},
        {"reconstruction_share": ((5, 0.1),)},
        {"reconstruction_share": ((0, 0.1), (9, 0.2), (4, 0.3))},
        {"reconstruction_share": ((0, 1.5),)},
        {"num_decoders": 0},
        {"window_shards": 0},
    ],
)
def test_values_out_of_range_are_refused(changes: dict) -> None:
    with pytest.raises(ConfigError):
        make_order(**changes)


@given(costs=st.lists(st.integers(1, 768), min_size=12, max_size=12), num_bins=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_dealing_is_a_partition_of_equal_sizes(costs: list[int], num_bins: int) -> None:
    bins = deal(costs, num_bins)
    assert sorted(sample for members in bins for sample in members) == list(range(12))
    assert {len(members) for members in bins} == {12 // num_bins}


def test_dealing_balances_work() -> None:
    costs = [768, 700, 650, 600, 130, 90, 50, 10]
    totals = [sum(costs[sample] for sample in members) for members in deal(costs, 4)]
    assert max(totals) / min(totals) < 1.1
    assert max(totals) < 0.6 * (costs[0] + costs[1]), "dealing in order would pair the two longest"


def test_batch_that_cannot_be_dealt_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple"):
        deal([1.0] * 10, 4)

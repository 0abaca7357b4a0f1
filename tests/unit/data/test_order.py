"""The order is a pure function of seed and position. Epochs lose or repeat no record, and quotas are exact."""

from __future__ import annotations

import pickle
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arc_ds.data.order.dealing import deal
from arc_ds.data.order.mixture import BLOCK, Mixture
from arc_ds.data.order.order import RunOrder, SourceShape
from arc_ds.data.order.randomness import permutation, random_words
from arc_ds.data.order.shuffle import WindowShuffle
from arc_ds.errors import ConfigError

SOURCES = (
    SourceShape(shard_sizes=(40, 33, 7, 20), fingerprint="a", weight=0.27),
    SourceShape(shard_sizes=(11, 5), fingerprint="b", weight=0.06),
    SourceShape(shard_sizes=(199,), fingerprint="c", weight=0.67),
)


FEW_SHOT = {"task": "few_shot", "samples": ("few_shot",)}
# The same sources, but the second has few-shot samples and the third has long contexts.
MIXED = (
    SOURCES[0],
    SourceShape(shard_sizes=(3, 2, 6), fingerprint="b", weight=0.4, **FEW_SHOT, in_context_examples=4),
    SourceShape(shard_sizes=(199,), fingerprint="c", weight=0.2, task="long_context", samples=("long_context",)),
)


def make_order(**changes) -> RunOrder:
    given_ones = {"seed": 1, "batch_size": 8, "sources": SOURCES, "num_decoders": 2, "window_shards": 2}
    return RunOrder(**(given_ones | changes))


def test_random_words_are_the_recorded_ones() -> None:
    """A change here would change the order of every resumed run."""
    assert random_words(2, 0, "sample", 5).tolist() == [8710512222159081382, 18055850970814257424]
    assert permutation(6, 7, "x").tolist() == [4, 5, 1, 0, 2, 3]
    assert random_words(2, np.int64(0), "sample", np.int32(5)).tolist() == random_words(2, 0, "sample", 5).tolist()


def test_epochs_differ_and_mix_shards() -> None:
    shuffle = WindowShuffle((50, 50, 50, 50), 2, (0, 0))
    records = shuffle.records(np.arange(400))[1].tolist()
    first, second = records[:200], records[200:]
    assert first != second
    assert first != sorted(first)
    alone = WindowShuffle((50,), 2, (0, 0))
    epochs, records = alone.records(np.arange(100))
    assert epochs.tolist() == [0] * 50 + [1] * 50
    assert records[:50].tolist() != records[50:].tolist()
    assert len({record // 50 for record in first[:30]}) == 2, "a window mixes its two shards"


@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=6), block=st.integers(0, 600))
def test_every_block_has_its_quota_to_one_sample(weights: list[float], block: int) -> None:
    mixture = Mixture(weights)
    counts = Counter(mixture.span(3, block * BLOCK, BLOCK)[0].tolist())
    for source, weight in enumerate(weights):
        # The weight itself is rounded to 1 / 65,536, which is 1/256 of a sample per block.
        assert abs(counts[source] - weight / sum(weights) * BLOCK) < 1 + 1 / 256


def test_mixture_is_exact_over_a_period_and_ranks_count_up() -> None:
    mixture = Mixture([0.27, 0.06, 0.67])
    ranks: dict[int, list[int]] = defaultdict(list)
    for source, rank in zip(*(part.tolist() for part in mixture.span(0, 0, BLOCK * 300)), strict=True):
        ranks[source].append(rank)
    for source, weight in enumerate((0.27, 0.06, 0.67)):
        assert sorted(ranks[source]) == list(range(len(ranks[source])))
        assert abs(sum(rank < weight * BLOCK * 256 for rank in ranks[source]) - weight * BLOCK * 256) <= 1


def test_a_weight_too_small_to_be_drawn_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\[1\]: weight 1e-09"):
        Mixture([1.0, 1e-9])


def test_zero_weight_source_is_never_drawn() -> None:
    mixture = Mixture([1.0, 0.0, 1.0])
    assert set(mixture.span(0, 0, 1000)[0].tolist()) == {0, 2}


@given(first=st.integers(0, 3000), count=st.integers(1, 700))
def test_a_span_is_a_piece_of_the_whole(first: int, count: int) -> None:
    mixture = Mixture([1.0, 2.5, 0.3])
    for whole, piece in zip(mixture.span(5, 0, 3700), mixture.span(5, first, count), strict=True):
        assert piece.tolist() == whole[first : first + count].tolist()


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_task_share_is_exact_in_each_step_and_over_steps(share: float) -> None:
    order = make_order(reconstruction_share=((0, share),))
    counts = [sum(pick.task == "reconstruction" for pick in order.batch(step)) for step in range(400)]
    assert all(abs(count - share * 8) < 1 for count in counts)
    assert abs(sum(counts) - share * 3200) <= 8


def test_task_share_changes_at_its_step() -> None:
    order = make_order(reconstruction_share=((0, 1.0), (10, 0.0)))
    tasks = [{pick.task for pick in order.batch(step)} for step in (0, 9, 10, 11)]
    assert tasks == [{"reconstruction"}] * 2 + [{"continuation"}] * 2


def test_decoders_take_equal_turns() -> None:
    sampled = [make_order(num_decoders=3).decoders(step) for step in range(300)]
    assert Counter(sampled) == {(0,): 100, (1,): 100, (2,): 100}
    assert sampled != [(step % 3,) for step in range(300)]
    alternate = make_order(num_decoders=3, decoder_schedule="alternate")
    assert [alternate.decoders(step) for step in range(4)] == [(0,), (1,), (2,), (0,)]
    together = make_order(num_decoders=3, decoder_schedule="same_batch")
    assert [together.decoders(step) for step in (0, 1, 7)] == [(0, 1, 2)] * 3


@st.composite
def orders(draw: st.DrawFn) -> RunOrder:
    """Any run: one to four sources of any sizes, tasks and weights."""
    sources = []
    for idx in range(draw(st.integers(1, 4))):
        sizes = draw(st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(sum))
        task = draw(st.sampled_from(["pretraining", "few_shot", "long_context"]))
        most = draw(st.integers(0, min(5, sum(sizes) - 1))) if task == "few_shot" else 0
        shape = {"task": task, "in_context_examples": most, "weight": draw(st.floats(0.05, 10))}
        sources.append(SourceShape(shard_sizes=tuple(sizes), fingerprint=str(idx), **shape))
    return RunOrder(
        seed=draw(st.integers(0, 2**32)),
        batch_size=draw(st.integers(1, 100)),
        sources=tuple(sources),
        reconstruction_share=((0, draw(st.floats(0, 1))),),
        window_shards=draw(st.integers(1, 4)),
    )


@settings(max_examples=40, deadline=None)
@given(order=orders(), first=st.integers(0, 5000))
def test_any_order_is_pure_whole_and_valid(order: RunOrder, first: int) -> None:
    """From any step on, a new object gives the same picks. A source gives each record at most once per epoch."""
    steps = range(first, first + 200 // order.batch_size + 1)
    picks = [pick for step in steps for pick in order.batch(step)]
    again = pickle.loads(pickle.dumps(order))
    assert picks == [pick for step in reversed(steps) for pick in reversed(again.batch(step))][::-1]
    assert [pick.position for pick in picks] == [*range(first * order.batch_size, (steps[-1] + 1) * order.batch_size)]
    seen = Counter((pick.source_idx, pick.epoch, pick.record_idx) for pick in picks)
    assert max(seen.values()) == 1
    for pick in picks:
        source = order.sources[pick.source_idx]
        used = {pick.record_idx, *pick.example_idxs}
        assert used <= set(range(source.num_records)) and len(used) == 1 + len(pick.example_idxs)
        assert len(pick.example_idxs) <= source.in_context_examples
    for source_idx, source in enumerate(order.sources):
        epochs = [epoch for idx, epoch, _ in seen if idx == source_idx]
        for epoch in range(min(epochs, default=0) + 1, max(epochs, default=0)):
            assert epochs.count(epoch) == source.num_records, "an epoch in between is whole"


def test_in_context_examples_come_in_all_numbers_from_all_records_alike() -> None:
    sources = (SourceShape(shard_sizes=(5,), fingerprint="a", **FEW_SHOT, in_context_examples=3),)
    order = make_order(sources=sources, batch_size=200)
    picks = [pick for step in range(50) for pick in order.batch(step)]
    numbers = Counter(len(pick.example_idxs) for pick in picks)
    # 10,000 draws of four equally likely numbers: 2,500 each with a deviation of 43. Six deviations are allowed.
    assert sorted(numbers) == [0, 1, 2, 3] and all(abs(count - 2500) < 6 * 43 for count in numbers.values())
    firsts = Counter((pick.record_idx, pick.example_idxs[0]) for pick in picks if pick.example_idxs)
    # 20 ordered pairs share 7,500 draws: 375 each, deviation 19.
    assert len(firsts) == 20 and all(abs(count - 375) < 6 * 19 for count in firsts.values())


def test_a_source_gives_samples_of_its_task_only() -> None:
    order = make_order(sources=MIXED, batch_size=64, reconstruction_share=((0, 0.25),))
    for step in range(20):
        tasks = Counter((pick.source_idx, pick.task) for pick in order.batch(step))
        assert set(tasks) <= {(0, "reconstruction"), (0, "continuation"), (1, "few_shot"), (2, "long_context")}
        pretraining = tasks[0, "reconstruction"] + tasks[0, "continuation"]
        assert abs(tasks[0, "reconstruction"] - 0.25 * pretraining) < 1


def test_the_order_is_the_recorded_one() -> None:
    """A change here would change the data of every resumed run."""
    picks = make_order().batch(3)
    records = [(0, 92), (0, 96), (2, 147), (0, 90), (1, 1), (2, 49), (2, 128), (2, 188)]
    assert [(pick.source_idx, pick.record_idx) for pick in picks] == records
    assert [pick.task for pick in picks].index("reconstruction") == 2
    assert picks[0].seed == 6799171896617531252


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"shard_sizes": (2, 1), "task": "few_shot", "in_context_examples": 3}, "holds 3 records.*at least 4"),
        ({"shard_sizes": (0, 0)}, "holds no record"),
    ],
)
def test_a_source_that_cannot_serve_is_named(source: dict, message: str) -> None:
    given_ones = {"shard_sizes": (9,), "fingerprint": "x", "name": "/data/squad"}
    with pytest.raises(ConfigError, match=rf"data\.sources\.1 \(/data/squad\).*{message}"):
        make_order(sources=(SOURCES[0], SourceShape(**(given_ones | source))))


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
        {"sources": (*SOURCES[:2], replace(SOURCES[2], task="long_context"))},
        {"sources": (*SOURCES[:2], replace(SOURCES[2], task="few_shot", in_context_examples=0))},
    ],
)
def test_fingerprint_tells_every_other_order(changes: dict) -> None:
    """The fingerprint covers everything that the order depends on. A source's name may differ between machines."""
    assert make_order(sources=tuple(replace(s, name="x") for s in SOURCES)).fingerprint == make_order().fingerprint
    assert make_order().fingerprint == make_order().fingerprint
    assert make_order(**changes).fingerprint != make_order().fingerprint


@given(costs=st.lists(st.integers(1, 60), min_size=24, max_size=24), num_bins=st.sampled_from([1, 2, 3, 8, 12, 24]))
def test_dealing_gives_each_next_costliest_sample_to_the_cheapest_bin_with_room(
    costs: list[int], num_bins: int
) -> None:
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for sample in sorted(range(24), key=lambda idx: -costs[idx]):
        with_room = [members for members in bins if len(members) < 24 // num_bins]
        min(with_room, key=lambda members: sum(costs[m] for m in members)).append(sample)
    assert [sorted(members) for members in bins] == [list(members) for members in deal(costs, num_bins)]


def test_batch_that_cannot_be_dealt_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple"):
        deal([1.0] * 10, 4)

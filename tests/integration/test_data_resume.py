"""The data of a run do not depend on the number of ranks and workers, or on stops and resumes."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arc_ds.data.loading.step_batch import StepBatch
from arc_ds.data.loading.workers import BatchLoader
from arc_ds.system.processes import die_with_parent
from arc_ds.tokenizers import load_tokenizer
from tests.helpers.batches import digest, sequences
from tests.helpers.tiny_mixture import IN_CONTEXT_EXAMPLES, SIZES, TinyMixture
from tests.helpers.waiting import LIMIT_S, wait_for


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> TinyMixture:
    return TinyMixture.write(tmp_path_factory.mktemp("mixture"))


# One leg of a run between two stops: ranks, workers per rank, steps.
LEGS = st.lists(
    st.tuples(st.sampled_from([1, 2, 3, 4]), st.sampled_from([0, 1, 2]), st.integers(1, 3)), min_size=2, max_size=3
)


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    batch_size=st.sampled_from([12, 24]),
    weights=st.tuples(*[st.floats(0.1, 1.0)] * 3),
    schedule=st.sampled_from(["sample", "same_batch"]),
    first=st.integers(0, 10**6),
    legs=LEGS,
)
def test_global_batches_do_not_depend_on_ranks_workers_or_stops(
    mixture: TinyMixture,
    seed: int,
    batch_size: int,
    weights: tuple[float, float, float],
    schedule: str,
    first: int,
    legs: list[tuple[int, int, int]],
) -> None:
    run = {"seed": seed, "batch_size": batch_size, "weights": weights, "schedule": schedule}
    made: list[StepBatch] = []
    step = first
    for world_size, num_workers, num_steps in legs:
        for rank in range(world_size):
            data = mixture.data(rank, world_size, **run)
            with BatchLoader(data, range(step, step + num_steps), num_workers=num_workers) as batches:
                made += batches
        step += num_steps
    alone = mixture.data(**run)
    assert sequences(made) == sequences(alone[idx] for idx in range(first, step))
    records: dict[int, Counter] = {idx: Counter() for idx in range(first, step)}
    for batch in made:
        records[batch.step].update(batch.record_ids)
    for idx, found in records.items():
        assert found == Counter((pick.source_idx, pick.record_idx) for pick in alone.order.batch(idx))


def test_few_shot_samples_have_other_records_of_their_source_as_examples(mixture: TinyMixture) -> None:
    """The test reads this from the text: the question of each block contains its record's number."""
    data = mixture.data(weights=(0.1, 0.8, 0.1), schedule="alternate")
    tokenizers = [load_tokenizer(mixture.decoder), load_tokenizer(mixture.encoder)]
    numbers: list[int] = []
    for decoder_idx, task, ids, contexts, *_ in chain.from_iterable(
        sequences(data[step] for step in range(12)).values()
    ):
        if task != "few_shot":
            continue
        blocks = tokenizers[decoder_idx].decode(list(ids)).split("Of what is block ")[1:]
        named = [int(block.split("?")[0]) for block in blocks]
        assert len(set(named)) == len(named) == len(contexts) <= 1 + IN_CONTEXT_EXAMPLES
        assert set(named) <= set(range(SIZES[1]))
        numbers.append(len(named))
    assert set(numbers) == {1, 2, 3, 4}


STEPS = 40
KILLED_AT = 17


def start_reading(
    mixture: TinyMixture, out: Path, first: int, *, hang_at: int, num_workers: int, rank: int, world_size: int
) -> subprocess.Popen:
    """Start a process that reads all steps and records the digest of each batch."""
    command = [sys.executable, "-m", "tests.helpers.read_steps", str(mixture.folder), str(out)]
    numbers = [first, STEPS, hang_at, num_workers, rank, world_size]
    return subprocess.Popen([*command, *map(str, numbers)], preexec_fn=die_with_parent)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_killed_and_resumed_inside_an_epoch_the_batches_are_bit_equal(
    mixture: TinyMixture, tmp_path: Path, rank: int, world_size: int
) -> None:
    """kill -9 hits the process during a step while two workers are ahead. The resumed process has one worker."""
    data = mixture.data(rank, world_size)
    expected = [digest(data[step]) for step in range(STEPS)]
    assert len(set(expected)) == STEPS
    out, again = tmp_path / "digests", tmp_path / "again"
    place = {"rank": rank, "world_size": world_size}
    killed = start_reading(mixture, out, 0, hang_at=KILLED_AT, num_workers=2, **place)
    wait_for(lambda: killed.poll() is not None or (out.exists() and out.read_text().count("\n") == KILLED_AT + 1))
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert start_reading(mixture, again, KILLED_AT + 1, hang_at=-1, num_workers=1, **place).wait(LIMIT_S) == 0
    assert out.read_text().split() + again.read_text().split() == expected

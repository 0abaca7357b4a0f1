"""The loader: any ranks and workers give the same batches from any step. Damaged records are named and counted."""

from __future__ import annotations

import logging
import os
import re
import resource
import signal
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from arc_ds.batch.packing import PackedBatch
from arc_ds.data.loading.micro_batches import MicroBatchLimits, pack_again
from arc_ds.data.loading.workers import BatchLoader
from arc_ds.errors import ConfigError, DataError
from arc_ds.shards.reader import ShardSet
from arc_ds.tokenizers import load_tokenizer
from tests.helpers.batches import digest, sequences
from tests.helpers.tiny_mixture import TinyMixture
from tests.helpers.waiting import LIMIT_S

BATCH = 8


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> TinyMixture:
    return TinyMixture.write(tmp_path_factory.mktemp("mixture"))


@pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 2)])
def test_global_batches_do_not_depend_on_ranks(mixture: TinyMixture, world_size: int, micro_batches: int) -> None:
    whole = mixture.data(batch_size=BATCH)
    expected = sequences(whole[step] for step in range(6))
    batches = []
    for rank in range(world_size):
        data = mixture.data(rank, world_size, batch_size=BATCH, micro_batches=micro_batches)
        batches += [data[step] for step in range(6)]
    assert sequences(batches) == expected
    sizes = {len(micro.batch.tasks) for batch in batches for micro in batch.micro_batches}
    assert sizes == {BATCH // (world_size * micro_batches)}


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_workers_and_resume_change_nothing(mixture: TinyMixture, num_workers: int) -> None:
    data = mixture.data(micro_batches=2)
    expected = [digest(data[step]) for step in range(5)]
    for first in (0, 3):
        with BatchLoader(mixture.data(micro_batches=2), range(first, 5), num_workers=num_workers) as batches:
            assert [digest(batch) for batch in batches] == expected[first:]
    assert len(set(expected)) == 5


# Torch alone would wait this interval for each worker.
PROGRAM = """
import os, signal, sys, threading, time
from pathlib import Path
from torch.utils.data import _utils
from arc_ds.data.loading.workers import BatchLoader
from arc_ds.launch.signals import StopRequest

_utils.MP_STATUS_CHECK_INTERVAL = 600.0
received = Path(sys.argv[2])

class Data:
    def __getitem__(self, step):
        if step == 4:
            while not received.exists():  # its first batch must have left
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600 if step > 4 else 0)
        return "x" * (1 << 20)

def main(way_out, steps):
    with StopRequest() as stop, BatchLoader(Data(), steps, num_workers=3, is_stopped=stop.is_set) as batches:
        for _ in range(3):
            next(batches)
        received.touch()
        print("3 batches", flush=True)
        if way_out == "error":
            raise RuntimeError("out of memory")
        if way_out == "stop":
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert list(batches) == list(batches) == []

main(sys.argv[1], [0, 1, 2, 4, 5, 6] if sys.argv[1] == "death" else [0, 1, 2, 5, 6, 7])
"""
WAYS_OUT = {
    "stop": (0, ""),
    "error": (1, "RuntimeError: out of memory\n"),
    "death": (
        1,
        "died with exit code -9, most likely because the host ran out of memory. Lower data.num_workers or the number "
        "of ranks on this host.\n",
    ),
}


@pytest.mark.parametrize("way_out", WAYS_OUT)
def test_no_way_out_waits_for_workers_that_are_stuck(tmp_path: Path, way_out: str) -> None:
    """A worker is stuck if its shards are on a hanging server.

    After an error, the traceback keeps its objects, including the loader, alive until the process exits.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, way_out, str(tmp_path / "received")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "3 batches\n", process.communicate()
    _, words = process.communicate(timeout=LIMIT_S)
    code, last_words = WAYS_OUT[way_out]
    assert process.returncode == code and words.endswith(last_words) and words.count("Traceback") == code, words


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of torch's half-made iterator
def test_a_worker_that_cannot_start_leaves_no_other_behind(
    mixture: TinyMixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started = BaseProcess.start, []

    def start_one(process: BaseProcess) -> None:
        if started:
            raise OSError("cannot allocate memory")
        started.append(process)
        start(process)

    monkeypatch.setattr(BaseProcess, "start", start_one)
    with pytest.raises(OSError, match="cannot allocate"), BatchLoader(mixture.data(), range(2), num_workers=2):
        pytest.fail("the workers started")
    started[0].join(LIMIT_S)
    assert started[0].exitcode == -signal.SIGKILL


def test_loaders_follow_each_other_without_a_trace(mixture: TinyMixture) -> None:
    """Torch keeps a table by the id of its iterator, and Python reuses ids."""
    for _ in range(8):
        with BatchLoader(mixture.data(), range(2), num_workers=1) as batches:
            next(batches)


def test_a_worker_leaves_stop_signals_to_its_rank(mixture: TinyMixture) -> None:
    """A scheduler signals every process of a job, perhaps twice. The rank needs its worker until the next boundary."""
    with BatchLoader(mixture.data(), range(12), num_workers=1) as batches:
        steps = [next(batches).step]
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
            os.kill(batches._workers[0].pid, number)
        steps += [batch.step for batch in batches]
    assert steps == list(range(12))


def test_decoder_of_the_step_gives_its_tokens(mixture: TinyMixture) -> None:
    data = mixture.data()
    assert {data[step].decoder_idxs for step in range(4)} == {(0,), (1,)}
    for step in range(4):
        batch = data[step]
        tokenizer = load_tokenizer([mixture.decoder, mixture.encoder][batch.decoder_idxs[0]])
        packed = batch.micro_batches[0].batch
        start, end = packed.decoder_cu_seqlens[:2].tolist()
        text = tokenizer.decode(packed.decoder_ids[(packed.text_rows >= start) & (packed.text_rows < end)].tolist())
        assert "Tower" in text or "block" in text


def test_batch_that_ranks_do_not_divide_is_refused(mixture: TinyMixture) -> None:
    with pytest.raises(ConfigError, match="multiple"):
        mixture.data(0, 5)


@pytest.fixture
def damaged(tmp_path: Path) -> TinyMixture:
    """A mixture whose first shard has one flipped byte in each of its first two records."""
    mixture = TinyMixture.write(tmp_path)
    source = ShardSet(tmp_path / "texts")
    path = source.folder / source.manifest.shards[0].name
    raw = bytearray(path.read_bytes())
    first = 512
    second = first + 512 * (1 + -(-len(b'{"text":""}' + source.record(0)["text"].encode()) // 512))
    raw[first + 9] ^= 1
    raw[second + 9] ^= 1
    path.write_bytes(raw)
    return mixture


def test_damaged_record_stops_the_run_by_default(damaged: TinyMixture) -> None:
    data = damaged.data()
    with pytest.raises(DataError, match=r"shard-000000\.tar, member .* the checksum"):
        for step in range(12):
            data[step]


def test_damaged_record_is_replaced_counted_and_named_once(
    damaged: TinyMixture, mixture: TinyMixture, caplog: pytest.LogCaptureFixture
) -> None:
    data = damaged.data(on_error="skip")
    with caplog.at_level(logging.WARNING):
        batches = [data[step] for step in range(40)]
    assert sum(batch.skipped for batch in batches) >= 3
    assert all((0, 0) not in batch.record_ids and (0, 1) not in batch.record_ids for batch in batches)
    assert len([record for record in caplog.records if "record skipped" in record.message]) == 2
    whole = mixture.data()
    for batch in batches:
        replaced = [(0, 2) if record in ((0, 0), (0, 1)) else record for record in whole[batch.step].record_ids]
        assert list(batch.record_ids) == replaced


def test_source_with_nothing_usable_is_an_error_not_a_hang(tmp_path: Path) -> None:
    mixture = TinyMixture.write(tmp_path)
    for path in (tmp_path / "texts").glob("*.tar"):
        path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(DataError, match="in a row"):
        mixture.data(on_error="skip")[0]


@pytest.mark.parametrize("schedule", ["sample", "same_batch"])
def test_shares_are_split_under_the_limits_alike_on_all_ranks(mixture: TinyMixture, schedule: str) -> None:
    limits = MicroBatchLimits(max_encoder_tokens=420, max_decoder_rows=350)
    whole = sequences(mixture.data(schedule=schedule)[step] for step in range(6))
    numbers = set()
    for step in range(6):
        ranks = [mixture.data(rank, 2, schedule=schedule, limits=limits) for rank in range(2)]
        batches = [data[step] for data in ranks]
        # If the index's lengths were too low, the ranks agree on the larger number and pack again.
        agreed = max(batch.num_splits for batch in batches)
        batches = [pack_again(batch, agreed, data.pooling, limits) for data, batch in zip(ranks, batches, strict=True)]
        assert {batch.num_splits for batch in batches} == {agreed}
        numbers.add(agreed)
        assert sequences(batches) == {step: whole[step]}
        for micro in (micro for batch in batches for micro in batch.micro_batches):
            assert micro.batch.num_encoder_tokens <= 420 and micro.batch.num_decoder_rows <= 350
    assert max(numbers) > 1


def test_decoders_on_the_same_batch_run_one_after_the_other(mixture: TinyMixture) -> None:
    batch = mixture.data(schedule="same_batch", micro_batches=3)[0]
    assert batch.decoder_idxs == (0, 1)
    assert [micro.decoder_idx for micro in batch.micro_batches] == [0, 0, 0, 1, 1, 1]
    assert len(batch.record_ids) == 12
    for first, second in zip(batch.micro_batches[:3], batch.micro_batches[3:], strict=True):
        assert first.part_idx == second.part_idx and first.batch.tasks == second.batch.tasks


def test_a_run_names_its_tasks(mixture: TinyMixture) -> None:
    assert mixture.data().tasks == ("reconstruction", "continuation", "few_shot", "long_context")


@pytest.mark.parametrize("schedule", ["sample", "same_batch"])
def test_limits_change_nothing_of_what_is_trained_on(
    mixture: TinyMixture, schedule: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A sample beyond a limit has a micro-batch of its own and is counted. The log names the first one."""
    limits = MicroBatchLimits(max_decoder_rows=120)
    whole = [mixture.data(schedule=schedule)[step] for step in range(6)]
    num_over = sum(rows > 120 for batch in whole for micro in batch.micro_batches for rows in rows_of(micro.batch))
    assert num_over > 1
    for on_error in ("stop", "skip"):
        caplog.clear()
        data = mixture.data(schedule=schedule, limits=limits, on_error=on_error)
        batches = [data[step] for step in range(6)]
        assert sequences(batches) == sequences(whole)
        assert sum(batch.over_limit for batch in batches) == num_over
        assert sum(batch.skipped for batch in batches) == 0
        for micro in (micro for batch in batches for micro in batch.micro_batches):
            assert micro.batch.num_decoder_rows <= 120 or len(micro.batch.tasks) == 1
        (warning,) = caplog.records
        assert re.search(r"record \d+: its sample has .* decoder rows, .* own; .*data/over_limit", warning.getMessage())


def rows_of(packed: PackedBatch) -> list[int]:
    """The number of decoder rows of each sequence."""
    return packed.decoder_cu_seqlens.diff().tolist()


class OpenFiles:
    """The limit of open files of the process that makes an item."""

    def __getitem__(self, _: int) -> int:
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_workers_may_open_as_many_files_as_the_system_allows() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowered = min(256, hard - 1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowered, hard))
    try:
        with BatchLoader(OpenFiles(), range(1), num_workers=1) as limits:  # type: ignore[arg-type]
            found = next(limits)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found > lowered

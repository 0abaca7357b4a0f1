"""Worker processes: their initial state, and no waiting for the remaining workers after one dies."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest

from arc_ds.errors import DataError, StorageError
from arc_ds.system.processes import worker_pool
from tests.helpers.waiting import LIMIT_S, wait_for

# Python ends the workers of a broken pool with SIGTERM. A worker that ignores SIGTERM stands for one that Python misses
# because it was still starting.
LEFT_OVER = """
import os, signal, sys, time
from pathlib import Path
from arc_ds.system.processes import worker_pool

def deaf():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

def stay(sign):
    Path(sign).touch()
    time.sleep(600)

def die(sign):
    while not Path(sign).exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    with worker_pool(2, deaf) as pool:
        pool.submit(stay, sys.argv[1])
        pool.submit(abs, 1).result()  # both are there, and the pool knows of both
        pool.submit(die, sys.argv[1]).result()
"""
# A thread receives Ctrl-C. Its Python handler runs in the main thread, which has just started the third of twelve
# workers. The background job of a shell ignores SIGINT, so the script sets its own handler.
INTERRUPTED = """
import os, signal, sys, threading
from multiprocessing.context import SpawnProcess
from arc_ds.system.processes import worker_pool

start, third, started = SpawnProcess.start, threading.Event(), []

def interrupt():
    third.wait()
    os.kill(os.getpid(), signal.SIGINT)

def start_and_interrupt(process):
    start(process)
    started.append(process)
    if len(started) == 3:
        third.set()
        thread.join()

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    SpawnProcess.start = start_and_interrupt
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with worker_pool(12):
            print("entered")
    finally:
        print(len(started), "started;", sum(process.is_alive() for process in started), "alive")
"""
KILLED = """
import multiprocessing, os, signal, time
from arc_ds.system.processes import worker_pool

if __name__ == "__main__":
    with worker_pool(2) as pool:
        pool.submit(time.sleep, 600)
        pool.submit(abs, 1).result()
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""
_begun_with = ""


def _begin(word: str) -> None:
    global _begun_with
    _begun_with = word


def _tell(idx: int) -> tuple[int, str, bool]:
    return idx, _begun_with, signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_workers_begin_as_told_and_leave_ctrl_c_to_their_parent() -> None:
    others = set(multiprocessing.active_children())
    with worker_pool(2, _begin, "word") as pool:
        assert list(pool.map(_tell, range(4))) == [(idx, "word", True) for idx in range(4)]
    with worker_pool(2) as pool:
        assert list(pool.map(_tell, range(4))) == [(idx, "", True) for idx in range(4)]
    assert set(multiprocessing.active_children()) <= others


def _run(script: str, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "script.py"
    path.write_text(script)
    command = [sys.executable, str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)


def test_a_worker_that_python_overlooks_does_not_hold_up_the_error(tmp_path: Path) -> None:
    ended = _run(LEFT_OVER, tmp_path, str(tmp_path / "sign"))
    assert ended.returncode == 1 and "DataError: a worker process died" in ended.stderr


def test_ctrl_c_while_workers_start_ends_them_and_the_program(tmp_path: Path) -> None:
    ended = _run(INTERRUPTED, tmp_path)
    assert ended.returncode == -signal.SIGINT and "KeyboardInterrupt" in ended.stderr, ended.stderr
    assert ended.stdout == "12 started; 0 alive\n"


def test_every_worker_starts_though_the_first_have_done_their_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent is slow: it starts a worker after the one before has begun, and would have had time for a task."""
    start, started = SpawnProcess.start, []

    def start_slowly(process: SpawnProcess) -> None:
        start(process)
        started.append(process)
        wait_for(lambda: len(list(tmp_path.iterdir())) == len(started))
        time.sleep(0.2)

    monkeypatch.setattr(SpawnProcess, "start", start_slowly)
    with worker_pool(3, _leave_sign, tmp_path):
        assert len(started) == 3


def _leave_sign(folder: Path) -> None:
    (folder / str(os.getpid())).touch()


def test_workers_end_with_a_killed_parent_idle_or_busy(tmp_path: Path) -> None:
    workers = [int(word) for word in _run(KILLED, tmp_path).stdout.split()]
    assert len(workers) == 2
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))


def _cannot_begin() -> None:
    raise StorageError("the server is gone")


def test_what_a_worker_cannot_begin_for_is_the_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StorageError, match="the server is gone"), worker_pool(2, _cannot_begin) as pool:
        pool.submit(abs, 1).result()
    assert "Traceback" not in capfd.readouterr().err


def test_workers_that_cannot_be_started_are_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third worker cannot start; the first two wait for it."""
    start, started = SpawnProcess.start, []

    def start_two(process: SpawnProcess) -> None:
        if len(started) == 2:
            raise OSError(errno.EMFILE, "Too many open files")
        started.append(process)
        start(process)

    monkeypatch.setattr(SpawnProcess, "start", start_two)
    with pytest.raises(DataError, match="4 workers cannot be started: .*Too many open files.*fewer"), worker_pool(4):
        pytest.fail("the workers started")
    assert len(started) == 2 and not any(process.is_alive() for process in started)
    with pytest.raises(DataError, match="at least 1"), worker_pool(0):
        pytest.fail("there are none")


def test_children_that_are_not_of_the_pool_are_left_alone() -> None:
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    other.start()
    try:
        with pytest.raises(DataError, match="fewer --workers"), worker_pool(2) as pool:
            pool.submit(os._exit, 1).result()
        assert other.is_alive()
    finally:
        other.kill()
        other.join()

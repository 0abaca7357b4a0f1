"""The launch wrapper around the real deepspeed launcher, with a stand-in for the training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from arc_ds.training.exit_codes import EXIT_FAILED, EXIT_OK, EXIT_PREEMPTED, EXIT_USER_ERROR

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = (
    "import sys; from arc_ds.launch import launch; from arc_ds.errors import ArcError\n"
    "try: code = launch('tests.helpers.fake_train', sys.argv[1:], num_procs=2, device_request='cpu')\n"
    "except ArcError as error: print('said:', error); code = 2\n"
    "sys.exit(code)"
)


def _start(mode: str, folder: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "RANK")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, mode, str(folder)],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def _wait_for(what: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline, "the ranks did not get that far"
        time.sleep(0.05)


def _started(folder: Path) -> bool:
    return len(list(folder.glob("pid_*"))) == 2


def _rank_pids(folder: Path) -> list[int]:
    return [int(path.read_text().split()[0]) for path in sorted(folder.glob("pid_*"))]


def _are_gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids)


def test_all_ranks_end_well(tmp_path: Path) -> None:
    process = _start("ok", tmp_path)
    assert process.wait(60) == EXIT_OK
    cores = len(os.sched_getaffinity(0))
    for path in tmp_path.glob("pid_*"):
        assert path.read_text().split()[1:] == [str(max(1, cores // 2)), "2"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_stop_signal_reaches_the_ranks_and_gives_the_preempted_code(tmp_path: Path, number: signal.Signals) -> None:
    """The stand-in opens its StopRequest half a second after the signal: a stop while loading is not lost."""
    process = _start("train", tmp_path)
    _wait_for(lambda: _started(tmp_path))
    process.send_signal(number)
    assert process.wait(60) == EXIT_PREEMPTED
    assert _are_gone(_rank_pids(tmp_path))


def test_a_killed_rank_ends_the_run_with_a_failure(tmp_path: Path) -> None:
    process = _start("die", tmp_path)
    assert process.wait(90) == EXIT_FAILED
    assert _are_gone(_rank_pids(tmp_path))


def test_kill_9_of_all_ranks_is_a_failure(tmp_path: Path) -> None:
    process = _start("train", tmp_path)
    _wait_for(lambda: _started(tmp_path))
    for pid in _rank_pids(tmp_path):
        os.kill(pid, signal.SIGKILL)
    assert process.wait(60) == EXIT_FAILED


def test_a_crash_of_one_rank_ends_all_with_its_traceback(tmp_path: Path) -> None:
    process = _start("crash", tmp_path)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == EXIT_FAILED
    assert "RuntimeError: rank one crashed" in output
    assert _are_gone(_rank_pids(tmp_path))


def test_a_users_mistake_is_said_once_and_has_its_code(tmp_path: Path) -> None:
    process = _start("user error", tmp_path)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == EXIT_USER_ERROR
    assert output.count("encoder.backbone is no folder") == 1
    assert "Traceback" not in output


def test_ranks_do_not_outlive_a_killed_wrapper(tmp_path: Path) -> None:
    process = _start("train", tmp_path)
    _wait_for(lambda: _started(tmp_path))
    pids = _rank_pids(tmp_path)
    process.kill()
    _wait_for(lambda: _are_gone(pids), limit_s=10.0)

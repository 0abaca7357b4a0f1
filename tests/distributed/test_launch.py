"""The launch wrapper with the real deepspeed launcher and a fake training module."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from arc_ds.launch.exit_codes import (
    EXIT_FAILED,
    EXIT_LOST_RANK,
    EXIT_OK,
    EXIT_OUT_OF_MEMORY,
    EXIT_PREEMPTED,
    EXIT_STALLED,
)
from tests.helpers.waiting import LIMIT_S, wait_for

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
import arc_ds.launch.wrapper

launcher, num_procs, *arguments = sys.argv[1:]
if launcher == "light":
    arc_ds.launch.wrapper._command = lambda module, arguments, place, environment: [
        sys.executable, "tests/helpers/light_launcher.py", str(*place.num_procs),
        "-m", "arc_ds.launch.rank", module, *arguments
    ]
sys.exit(
    arc_ds.launch.wrapper.launch(
        "tests.helpers.fake_train", arguments, num_procs=int(num_procs), device_request="cpu"
    )
)
"""


_started_here: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _end_what_a_failed_test_left() -> Iterator[None]:
    yield
    for process in _started_here:
        process.kill()
        process.communicate()
    _started_here.clear()


def _start(mode: str, folder: Path, launcher: str = "light", num_procs: int = 2) -> subprocess.Popen[str]:
    """Start the wrapper in a separate process. DeepSpeed's launcher takes 5 s of CPU time, so few tests use it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "RANK")}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, launcher, str(num_procs), mode, str(folder)],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    _started_here.append(process)
    return process


def _started(folder: Path) -> bool:
    return len(list(folder.glob("pid_*"))) == 2


def _rank_pids(folder: Path, num_procs: int = 2) -> list[int]:
    pids = [int(path.read_text().split()[0]) for path in sorted(folder.glob("pid_*"))]
    assert len(pids) == num_procs
    return pids


def _are_gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids)


def _stop(folder: Path, number: signal.Signals, launcher: str) -> int:
    process = _start("train", folder, launcher)
    wait_for(lambda: _started(folder))
    process.send_signal(number)
    return process.wait(LIMIT_S)


def test_deepspeeds_launcher_stop_signal_gives_the_preempted_code(tmp_path: Path) -> None:
    assert _stop(tmp_path, signal.SIGTERM, "deepspeed") == EXIT_PREEMPTED
    wait_for(lambda: _are_gone(_rank_pids(tmp_path)))


def test_deepspeeds_launcher_killed_rank_ends_the_run_with_a_failure(tmp_path: Path) -> None:
    process = _start("die", tmp_path, "deepspeed")
    assert process.wait(LIMIT_S) == EXIT_LOST_RANK
    wait_for(lambda: _are_gone(_rank_pids(tmp_path)))


def test_deepspeeds_launcher_ranks_do_not_outlive_a_killed_wrapper(tmp_path: Path) -> None:
    process = _start("train", tmp_path, "deepspeed")
    wait_for(lambda: _started(tmp_path))
    pids = _rank_pids(tmp_path)
    process.kill()
    wait_for(lambda: _are_gone(pids))


def test_all_ranks_end_well_and_share_the_cores(tmp_path: Path) -> None:
    assert _start("ok", tmp_path).wait(LIMIT_S) == EXIT_OK
    cores = len(os.sched_getaffinity(0))
    for path in tmp_path.glob("pid_*"):
        assert path.read_text().split()[1:] == [str(max(1, cores // 2)), "2"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_stop_signal_while_the_ranks_load_is_not_lost(tmp_path: Path, number: signal.Signals) -> None:
    """The fake training module opens its StopRequest half a second after the signal."""
    assert _stop(tmp_path, number, "light") == EXIT_PREEMPTED


def test_kill_9_of_all_ranks_is_a_failure_though_the_launcher_ends_with_0(tmp_path: Path) -> None:
    process = _start("train", tmp_path)
    wait_for(lambda: _started(tmp_path))
    for pid in _rank_pids(tmp_path):
        os.kill(pid, signal.SIGKILL)
    assert process.wait(LIMIT_S) == EXIT_LOST_RANK


def test_a_crash_of_one_rank_ends_all_with_its_traceback(tmp_path: Path) -> None:
    process = _start("crash", tmp_path)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == EXIT_FAILED
    assert "RuntimeError: rank one crashed" in output
    wait_for(lambda: _are_gone(_rank_pids(tmp_path)))


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        ("killed", EXIT_LOST_RANK, ("lost rank 1 on {host} at step 4, decoder small", "was killed")),
        ("frozen", EXIT_LOST_RANK, ("lost rank 1 on {host} at step 4, decoder small", "no sign of life for 20 s")),
        ("raises", EXIT_FAILED, ("rank 1 on {host} failed at step 4, decoder small: KeyError: 'no such key'",)),
        ("memory", EXIT_OUT_OF_MEMORY, ("rank 1 needs more memory",)),
        (
            "stalled",
            EXIT_STALLED,
            (
                "no step has ended for 5 s (stall_limit_s). The stacks are in {folder}/stacks_rank_*.txt.",
                "Stuck: ranks 0, 2 on {host} at step 4, encoder layer 7; rank 1 on {host} at step 4, decoder small",
            ),
        ),
        ("stuck", EXIT_STALLED, ("a stop was requested, but no step has ended for 2 s", "nothing could be saved")),
    ],
)
def test_a_fault_of_one_rank_ends_all_with_one_message(
    tmp_path: Path, fault: str, code: int, words: tuple[str, ...]
) -> None:
    """The other ranks wait for rank 1 in a collective of gloo, in C code, which alone would wait for 30 minutes."""
    process = _start(fault, tmp_path, num_procs=3)
    if fault == "stuck":
        wait_for((tmp_path / "fault").exists)
        process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == code, output
    for each in words:
        message = each.format(host=socket.gethostname(), folder=tmp_path)
        assert len([line for line in output.splitlines() if message in line]) == 1, output
    assert ("Traceback" in output) == (fault == "raises"), output
    wait_for(lambda: _are_gone(_rank_pids(tmp_path, num_procs=3)))
    if code == EXIT_STALLED:
        stacks = [(tmp_path / f"stacks_rank_{rank:05d}.txt").read_text() for rank in range(3)]
        assert "decoder small" in stacks[1] and all("in _train_together" in each for each in stacks)

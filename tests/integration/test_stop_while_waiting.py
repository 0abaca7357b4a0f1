"""A stop while a rank waits for its batch, as for a server that hangs, or for another rank. Ranks as real processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from arc_ds.launch.exit_codes import EXIT_PREEMPTED
from arc_ds.system.dist import free_port
from arc_ds.system.processes import die_with_parent
from tests.helpers.tiny_run import last_saved_step, losses
from tests.helpers.waiting import LIMIT_S

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# A rank with workers that hang. Those of rank 1 hang from `stuck_step` on and signal their rank once all possible steps
# are done. Those of rank 0 hang from the next step on, and that rank never gets a signal.
RANK = """
import os, signal, sys, time
from pathlib import Path
from torch.utils.data import _utils
from arc_ds import train
from arc_ds.data.loading.loader import StepData
from arc_ds.training import build_data

_utils.MP_STATUS_CHECK_INTERVAL = 600.0  # torch alone would wait it for each worker that hangs

class Stuck(StepData):
    def __getitem__(self, step):
        stuck_step, run = int(sys.argv[1]), Path(sys.argv[3].removeprefix("run_dir="))
        if step == stuck_step and self.rank == 1:
            log = run / "metrics.jsonl"
            while step and (not log.exists() or log.read_text().count("train/grad_norm") < step - 1):
                time.sleep(0.05)
            time.sleep(0.5)
            os.kill(os.getppid(), signal.SIGUSR1)
        if step >= stuck_step + (self.rank == 0):
            time.sleep(3600)
        return super().__getitem__(step)

build_data.StepData = Stuck
sys.exit(train._as_rank(sys.argv[2:]))
"""
SHORT = ("data.num_workers=6", "checkpoint.every=0", "data.validation=null", "validation.every=0")


def _start(rank: int, port: int, command: list[str]) -> subprocess.Popen[str]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | {name: str(value) for name, value in place.items()},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=die_with_parent,
    )


@pytest.mark.parametrize("stuck_step", [0, 3])
def test_a_rank_that_waits_for_its_batch_obeys_a_stop_at_once(config: Path, tmp_path: Path, stuck_step: int) -> None:
    """The other rank waits for this one in the step before the missing batch, and learns of the stop there.

    Before the first step there is nothing to save.
    """
    run, port = tmp_path / "run", free_port()
    command = ["-c", RANK, str(stuck_step), str(config), f"run_dir={run}", *SHORT]
    for process in [_start(rank, port, command) for rank in range(2)]:
        _, words = process.communicate(timeout=LIMIT_S)
        assert process.returncode == EXIT_PREEMPTED, words
    assert last_saved_step(run) == stuck_step
    assert stuck_step == 0 or len(losses(run)) == stuck_step


def test_a_rank_that_waits_for_another_says_so_and_obeys_ctrl_c(config: Path, tmp_path: Path) -> None:
    process = _start(0, free_port(), ["-m", "arc_ds.train", str(config), f"run_dir={tmp_path / 'run'}"])
    (deadline := threading.Timer(LIMIT_S, process.kill)).start()
    assert any("waiting for all 2 ranks at 127.0.0.1:" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=LIMIT_S) == EXIT_PREEMPTED
    deadline.cancel()
    assert "SIGINT: stopped before training began" in process.stderr.read() and not (tmp_path / "run").exists()


def test_a_port_that_another_program_uses_is_named(config: Path, tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", 0)) as other:
        command = ["-m", "arc_ds.train", str(config), f"run_dir={tmp_path / 'run'}"]
        _, words = _start(0, other.getsockname()[1], command).communicate(timeout=LIMIT_S)
    assert "EADDRINUSE" in words and "MASTER_PORT (a port that no other program uses" in words
    assert "Traceback" not in words

"""A run on two hosts whose connection is cut: both sides end with the name of the other, and the run can go on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arc_ds.launch.exit_codes import EXIT_LOST_RANK, EXIT_OK
from tests.helpers.hosts import INTERFACE, Host, wait_until
from tests.helpers.tiny_run import (
    EVERY,
    ROOT,
    STEPS,
    last_logged_step,
    last_saved_step,
    losses,
    read_json,
)
from tests.helpers.waiting import LIMIT_S

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# A rank on a busy machine must send a byte in this time.
TIMEOUT_S = 20
GOLDEN = ROOT / "tests" / "integration" / "golden_losses.json"


def _start(hosts: tuple[Host, ...], config: Path, run: Path) -> list[subprocess.Popen[str]]:
    """One rank on each host, as with `--no_ssh`."""
    processes = []
    for rank, host in enumerate(hosts):
        place = {"RANK": rank, "LOCAL_RANK": 0, "LOCAL_SIZE": 1, "WORLD_SIZE": len(hosts)}
        place |= {"MASTER_ADDR": hosts[0].name, "MASTER_PORT": 29517, "GLOO_SOCKET_IFNAME": INTERFACE}
        env = {**os.environ, **{name: str(value) for name, value in place.items()}, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "arc_ds.train", config, f"run_dir={run}", "tracking.mlflow=false"]
        processes.append(host.start([*command, f"distributed.timeout_s={TIMEOUT_S}"], cwd=ROOT, env=env))
    return processes


def test_both_sides_of_a_cut_link_end_with_the_name_of_the_other(
    hosts: tuple[Host, ...], config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    processes = _start(hosts, config, run)
    wait_until(lambda: last_logged_step(run) > EVERY, "the first step after a checkpoint", processes[0])
    hosts[1].cut()
    cut_at = time.monotonic()
    for rank, process in enumerate(processes):
        console, _ = process.communicate(timeout=LIMIT_S)
        other = 1 - rank
        assert process.returncode == EXIT_LOST_RANK, console
        (message,) = [line for line in console.splitlines() if "lost rank" in line]
        assert f"lost rank {other} on {hosts[other].name} at step " in message, console
        assert f"no sign of life for {TIMEOUT_S} s" in message and "Traceback" not in console, console
    print(f"both ended {time.monotonic() - cut_at:.1f} s after the cut")
    assert last_saved_step(run) in (EVERY, 2 * EVERY)


def test_a_run_loses_a_host_and_goes_on_with_the_other(
    ssh_hosts: tuple[Host, ...], config: Path, tmp_path: Path
) -> None:
    """The losses are those of a run on one host, but for the order of additions (see `test_kill_and_resume`)."""
    here, there = ssh_hosts
    run, hostfile = tmp_path / "run", tmp_path / "hosts"
    hostfile.write_text(f"{here.name} slots=1\n{there.name} slots=1\n")
    command = [sys.executable, "-m", "arc_ds.cli", "train", config, f"run_dir={run}", "tracking.mlflow=false"]
    command += [f"distributed.timeout_s={TIMEOUT_S}", f"--hostfile={hostfile}", "--restarts=2", "--min-hosts=1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": INTERFACE}
    process = here.start(command, cwd=ROOT, env=env)
    wait_until(lambda: last_logged_step(run) > EVERY, "the first step after a checkpoint", process)
    there.cut()
    console, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == EXIT_OK, console
    assert f"lost rank 1 on {there.name} at step " in console, console
    assert "ended with code 4 (a rank or host was lost); restart 1 of 2" in console, console
    assert "was written by 2 ranks and is read by 1" in console, console
    assert not [words for words in there.processes().values() if "arc_ds.train" in words], "a cut-off rank still runs"
    golden = read_json(GOLDEN)["losses"]
    assert len(golden) == STEPS and losses(run) == pytest.approx(golden, rel=1e-6, abs=0)

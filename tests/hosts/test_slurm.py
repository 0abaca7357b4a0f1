"""`launchers/slurm.sbatch` on a real SLURM with two nodes: run, early signal, preemption, requeue, resume."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from arc_ds.launch.exit_codes import EXIT_OK
from tests.helpers.hosts import INTERFACE, Host, missing, wait_until
from tests.helpers.slurm import PROGRAMS, Slurm
from tests.helpers.tiny_run import PLAIN, ROOT, last_logged_step, last_saved_step, losses, train
from tests.hosts.ranks import has_stop_signal, ranks, stop_between_steps

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif("ARC_HOSTS" not in os.environ, reason="whole runs take minutes; set ARC_HOSTS=1"),
]

SMALL = ("steps=30", *PLAIN)


@pytest.fixture(scope="module")
def slurm(hosts: tuple[Host, ...], tmp_path_factory: pytest.TempPathFactory) -> Slurm:
    if (reason := missing(*PROGRAMS)) is not None:
        pytest.skip(reason)
    return Slurm(tmp_path_factory.mktemp("slurm") / "files", hosts)


def test_a_job_that_slurm_signals_and_preempts_is_requeued_and_has_the_losses_of_an_undisturbed_run(
    slurm: Slurm, hosts: tuple[Host, ...], config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    env = {"CONFIG": str(config), "ARC_PYTHON": sys.executable, "GLOO_SOCKET_IFNAME": INTERFACE}
    env |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    options = ["--parsable", "-p", "low", "--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/log"]
    script = ROOT / "launchers" / "slurm.sbatch"
    submitted = slurm.command("sbatch", *options, script, f"run_dir={run}", *SMALL, cwd=ROOT, **env)
    job = submitted.strip()

    def restarts() -> int:
        return int(slurm.job(job)["Restarts"])

    def is_in(*states: str) -> bool:
        return slurm.job(job)["JobState"] in states

    def wait_for(condition: Callable[[], bool], what: str) -> None:
        wait_until(lambda: condition() or is_in("FAILED", "CANCELLED", "NODE_FAIL"), what)
        log = tmp_path / "log"
        assert condition(), f"{slurm.job(job)}\n{log.read_text() if log.exists() else ''}"

    def two_steps_from(begun: int) -> None:
        wait_for(lambda: last_logged_step(run) > begun + 1, "two steps")

    two_steps_from(0)
    # As SLURM does before the time limit.
    signalled = [pid for host in hosts for pid in ranks(host)]
    signal_job = partial(slurm.command, "scancel", "--signal=USR1", job)
    stop_between_steps(hosts, signal_job, lambda: all(map(has_stop_signal, signalled)))
    wait_for(lambda: restarts() == 1, "the return to the queue")
    first = last_saved_step(run)
    assert 2 <= first == last_logged_step(run)
    two_steps_from(first)
    others: list[subprocess.Popen[str]] = []
    start_other = partial(slurm.start, "srun", "-p", "high", "-N", "2", "hostname")
    # SLURM itself continues frozen processes before it signals them.
    is_saved = lambda: last_saved_step(run) > first  # noqa: E731
    stop_between_steps(hosts, lambda: others.append(start_other()), is_saved)
    wait_for(lambda: restarts() >= 2, "the return to the queue after the preemption")
    words = others[0].communicate()[0].splitlines()
    assert sorted(line for line in words if not line.startswith("srun:")) == slurm.hosts
    second = last_saved_step(run)
    assert first + 2 <= second
    wait_for(lambda: is_in("COMPLETED"), "the end of the job")
    assert slurm.job(job)["ExitCode"] == "0:0"
    assert f"stopped and saved at step {first}" in (tmp_path / "log").read_text()
    assert f"stopped and saved at step {second}" in (tmp_path / "log").read_text()

    code, console = train(config, [f"run_dir={tmp_path / 'one_host'}", *SMALL], num_ranks=2)
    assert code == EXIT_OK, console
    assert losses(run) == pytest.approx(losses(tmp_path / "one_host"), rel=1e-6)

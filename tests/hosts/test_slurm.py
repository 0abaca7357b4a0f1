"""`launchers/slurm.sbatch` on a real SLURM with two nodes: run, early signal, preemption, requeue, resume."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from arc_ds.launch.exit_codes import EXIT_OK
from tests.helpers.hosts import INTERFACE, Host, missing, wait_until
from tests.helpers.slurm import PROGRAMS, Slurm
from tests.helpers.tiny_run import ROOT, last_logged_step, last_saved_step, losses, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SMALL = (
    "steps=100",
    "checkpoint.every=0",
    "validation.every=0",
    "data.validation=null",
    "data.num_workers=0",
    "tracking.mlflow=false",
)


@pytest.fixture(scope="module")
def slurm(hosts: tuple[Host, ...], tmp_path_factory: pytest.TempPathFactory) -> Slurm:
    if (reason := missing(*PROGRAMS)) is not None:
        pytest.skip(reason)
    return Slurm(tmp_path_factory.mktemp("slurm") / "files", hosts)


def test_a_job_that_slurm_signals_and_preempts_is_requeued_and_has_the_losses_of_an_undisturbed_run(
    slurm: Slurm, config: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    env = {"CONFIG": str(config), "ARC_PYTHON": sys.executable, "GLOO_SOCKET_IFNAME": INTERFACE}
    env |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
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
    slurm.command("scancel", "--signal=USR1", job)  # as SLURM does before the time limit
    wait_for(lambda: restarts() == 1, "the return to the queue")
    first = last_saved_step(run)
    assert 2 <= first == last_logged_step(run)
    two_steps_from(first)
    other = slurm.start("srun", "-p", "high", "-N", "2", "hostname")
    wait_for(lambda: restarts() >= 2, "the return to the queue after the preemption")
    assert sorted(other.communicate()[0].split()) == slurm.hosts
    second = last_saved_step(run)
    assert first + 2 <= second
    wait_for(lambda: is_in("COMPLETED"), "the end of the job")
    assert "ExitCode" in slurm.job(job) and slurm.job(job)["ExitCode"] == "0:0"
    assert f"stopped and saved at step {first}" in (tmp_path / "log").read_text()
    assert f"stopped and saved at step {second}" in (tmp_path / "log").read_text()

    code, console = train(config, [f"run_dir={tmp_path / 'one_host'}", *SMALL], num_ranks=2)
    assert code == EXIT_OK, console
    assert losses(run) == pytest.approx(losses(tmp_path / "one_host"), rel=1e-6)

"""A real SLURM on the hosts of `tests.helpers.hosts`: munged and slurmd on each, slurmctld on the first.

It has no control groups: `proctrack/linuxproc` tracks processes. Jobs of the partition `high` preempt those of `low`,
which go back into the queue.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.helpers.hosts import Host, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
_CONFIG = """
ClusterName=test
SlurmctldHost={first.name}({first.address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that goes back into the queue waits for cred_expire seconds.
AuthInfo=socket={folder}/private/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/linear
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=1,bf_interval=1
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=120
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={names} CPUs=4
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=120
PartitionName=high Nodes=ALL PriorityTier=9 PreemptMode=OFF
"""


class Slurm:
    """A running SLURM.

    hosts: names of its nodes.
    """

    def __init__(self, folder: Path, hosts: Sequence[Host]) -> None:
        self._folder, self._first = folder, hosts[0]
        self.hosts = [host.name for host in hosts]
        self._env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        for path in (folder, folder / "state", folder / "private"):
            path.mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        names = ",".join(self.hosts)
        (folder / "slurm.conf").write_text(_CONFIG.format(first=hosts[0], folder=folder, names=names))
        private = folder / "private"
        options = {"key-file": key, "socket": private / "munge.socket", "pid-file": private / "munge.pid"}
        options |= {"log-file": private / "log", "seed-file": private / "seed"}
        for host in hosts:
            # SLURM has one path for the sockets of all hosts.
            assert host.run(["mount", "-t", "tmpfs", "tmpfs", private]) == (0, "")
            self._start(host, "munged", "-F", "--force", *(f"--{name}={value}" for name, value in options.items()))
            self._wait_for_log(f"munged_{host.name}", "Created socket")
        self._start(hosts[0], "slurmctld", "-D")
        for host in hosts:
            self._start(host, "slurmd", "-D", "-N", host.name)
        is_idle = f"{len(hosts)} idle"
        wait_until(lambda: self.command("sinfo", "-h", "-p", "low", "-o", "%D %t").strip() == is_idle, is_idle)

    def command(self, *words: str | Path, cwd: Path | None = None, **env: str) -> str:
        """Output of a SLURM command on the first host."""
        code, console = self._first.run(words, cwd=cwd, env={**self._env, **env})
        assert code == 0, console
        return console

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start a SLURM command on the first host."""
        return self._first.start(words, env=self._env)

    def job(self, number: str) -> dict[str, str]:
        """Fields of a job as `scontrol` shows them."""
        shown = self.command("scontrol", "show", "job", "--oneliner", number)
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)

    def _start(self, host: Host, program: str, *options: str) -> None:
        with (self._folder / f"{program}_{host.name}").open("w") as log:
            host.start([program, *options], env=self._env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def _wait_for_log(self, name: str, words: str) -> None:
        wait_until(lambda: words in (self._folder / name).read_text(), f"`{words}` in {name}")

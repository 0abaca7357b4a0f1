"""One run on two hosts passes through all launchers: each is stopped after some steps, and the next one resumes.

The losses are those of one host without a stop.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from arc_ds.launch.exit_codes import EXIT_OK, EXIT_PREEMPTED, EXIT_USER_ERROR
from tests.helpers.hosts import INTERFACE, Host, wait_until
from tests.helpers.sshd import is_sshd
from tests.helpers.tiny_run import PLAIN, ROOT, last_logged_step, last_saved_step, losses, train
from tests.helpers.waiting import LIMIT_S
from tests.hosts.ranks import has_stop_signal, ranks, stop_between_steps

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif("ARC_HOSTS" not in os.environ, reason="whole runs take minutes; set ARC_HOSTS=1"),
]

STEPS = 40
SMALL = (f"steps={STEPS}", *PLAIN)
BIN = Path(sys.executable).parent
PORT = "29533"


@pytest.fixture(scope="module")
def one_host(config: Path) -> list[float]:
    """The losses of two ranks on one host."""
    run = config.parent / "one_host"
    code, console = train(config, [f"run_dir={run}", *SMALL], num_ranks=2)
    assert code == EXIT_OK, console
    return losses(run)


class Relay:
    """The run, its folder and the hosts.

    The working folder has a space, except for pdsh: DeepSpeed does not quote it.
    """

    def __init__(self, config: Path, hosts: tuple[Host, ...], folder: Path) -> None:
        self.hosts = hosts
        self.run = folder / "run"
        self.arguments = [str(config), f"run_dir={self.run}", *SMALL]
        self.folder = folder / "a folder"
        self.folder.mkdir()
        self.hostfile = folder / "hosts"
        self.hostfile.write_text("# our hosts\n" + "".join(f"{host.name} slots=1\n" for host in hosts))
        more = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": INTERFACE, "DS_ACCELERATOR": "cpu"}
        self.env = {**os.environ, **more, "DEEPSPEED": str(BIN / "deepspeed"), "FOO": "a b"}
        (folder / ".deepspeed_env").write_text(f"FOO=a b\nGLOO_SOCKET_IFNAME={INTERFACE}\n")

    def start(self, host: Host, command: list[str | Path], **options: Any) -> subprocess.Popen[str]:
        return host.start([*command, *self.arguments], **{"cwd": self.folder, "env": self.env, **options})

    def has_trained(self, process: subprocess.Popen[str]) -> None:
        """Wait for two further steps."""
        begun = last_logged_step(self.run)
        wait_until(lambda: last_logged_step(self.run) > begun + 1, f"step {begun + 2}", process)

    def check_variables(self) -> None:
        """The rank of each host must have FOO as it was set."""
        for host in self.hosts:
            (rank,) = ranks(host)
            assert "FOO=a b" in Path(f"/proc/{rank}/environ").read_text().split("\0")

    def stop(
        self, send: Callable[[], None], signalled: Sequence[Host] = (), ended: subprocess.Popen[str] | None = None
    ) -> None:
        """Stop the ranks by `send`: it signals those on `signalled`, or ends the launcher `ended`."""
        pids = [pid for host in signalled for pid in ranks(host)]
        has_ended = (lambda: True) if ended is None else (lambda: ended.poll() is not None)
        stop_between_steps(self.hosts, send, lambda: has_ended() and all(map(has_stop_signal, pids)))

    def ended(self, *processes: subprocess.Popen[str]) -> tuple[list[int], str]:
        """Wait for the launchers and all ranks. Their last step must be saved, and steps must be left."""
        consoles = [process.communicate(timeout=LIMIT_S)[0] for process in processes]
        wait_until(lambda: not self.running(), "the end of all ranks")
        assert last_saved_step(self.run) == last_logged_step(self.run) < STEPS, consoles
        return [process.returncode for process in processes], "\n".join(consoles)

    def running(self) -> list[str]:
        """Command lines of launchers and ranks."""
        return [words for host in self.hosts for words in host.processes().values() if not is_sshd(words)]


def _no_ssh(relay: Relay, host: Host) -> subprocess.Popen[str]:
    words = ["--hostfile", relay.hostfile, "--no_ssh", "--node_rank", str(host.number)]
    words += ["--master_addr", relay.hosts[0].name, "--master_port", PORT, "--no_local_rank", "--module"]
    return relay.start(host, [BIN / "deepspeed", *words, "arc_ds.train"])


def _torchrun(relay: Relay, host: Host) -> subprocess.Popen[str]:
    words = ["--nnodes=2", "--nproc-per-node=1", f"--node-rank={host.number}"]
    words += [f"--master-addr={relay.hosts[0].name}", f"--master-port={PORT}", "-m", "arc_ds.train"]
    return relay.start(host, [BIN / "torchrun", *words])


def _ssh(relay: Relay) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "arc_ds.cli", "train", "--hostfile", relay.hostfile]
    return relay.start(relay.hosts[0], command)


def _pdsh(relay: Relay) -> subprocess.Popen[str]:
    return relay.start(relay.hosts[0], [ROOT / "launchers" / "pdsh.sh", relay.hostfile], cwd=relay.run.parent)


def _stop_ssh(relay: Relay) -> None:
    _stop_one(relay, _ssh(relay), relay.hosts)


def _stop_pdsh(relay: Relay) -> None:
    _stop_one(relay, _pdsh(relay), relay.hosts[:1])


def _stop_one(relay: Relay, process: subprocess.Popen[str], signalled: Sequence[Host]) -> None:
    """Signal the launcher of all hosts. It signals the ranks of some."""
    relay.has_trained(process)
    relay.check_variables()
    relay.stop(lambda: process.send_signal(signal.SIGTERM), signalled)
    codes, console = relay.ended(process)
    assert codes == [EXIT_PREEMPTED], console


def _kill_pdsh(relay: Relay) -> None:
    """The end of `deepspeed` ends pdsh, and the ranks notice the end of their ssh sessions."""
    process = _pdsh(relay)
    relay.has_trained(process)
    (runner,) = [pid for pid, words in relay.hosts[0].processes().items() if "bin/deepspeed --hostfile" in words]
    relay.stop(lambda: os.kill(runner, signal.SIGKILL), ended=process)
    codes, console = relay.ended(process)
    assert codes == [128 + signal.SIGKILL], console


def _stop_no_ssh(relay: Relay) -> None:
    """SIGTERM ends the `deepspeed` of one host at once. Its rank notices, and tells the other one."""
    first, second = (_no_ssh(relay, host) for host in relay.hosts)
    relay.has_trained(first)
    relay.stop(second.terminate, ended=second)
    codes, console = relay.ended(first, second)
    assert codes == [EXIT_PREEMPTED, -signal.SIGTERM], console


def _kill_torchrun(relay: Relay) -> None:
    first, second = (_torchrun(relay, host) for host in relay.hosts)
    relay.has_trained(first)
    relay.stop(second.kill, ended=second)
    codes, console = relay.ended(first, second)
    assert codes[1] == -signal.SIGKILL and "exitcode  : 75" in console, console


STOPS: dict[str, Callable[[Relay], None]] = {
    "ssh": _stop_ssh,
    "pdsh": _stop_pdsh,
    "pdsh, deepspeed killed": _kill_pdsh,
    "no_ssh": _stop_no_ssh,
    "torchrun killed": _kill_torchrun,
}


def test_a_run_that_each_launcher_stops_and_the_next_resumes_has_the_losses_of_one_host(
    config: Path, ssh_hosts: tuple[Host, ...], tmp_path: Path, one_host: list[float]
) -> None:
    relay = Relay(config, ssh_hosts, tmp_path)
    reached = [0]
    for name, stop in STOPS.items():
        if name.startswith("pdsh") and not (shutil.which("pdsh") and shutil.which("setpriv")):
            continue
        stop(relay)
        assert last_saved_step(relay.run) > reached[-1], name
        reached.append(last_saved_step(relay.run))
    process = _ssh(relay)
    console, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == EXIT_OK, console
    assert len(one_host) == STEPS
    assert losses(relay.run) == pytest.approx(one_host, rel=1e-6), reached
    assert one_host[0] != pytest.approx(one_host[-1], rel=1e-2), "nothing was learned"


def test_each_launcher_passes_the_exit_code_of_the_ranks_on(
    config: Path, ssh_hosts: tuple[Host, ...], tmp_path: Path
) -> None:
    relay = Relay(config, ssh_hosts, tmp_path)
    relay.arguments.append("optimizer.unknown=1")
    started = [_no_ssh(relay, host) for host in relay.hosts]
    if shutil.which("pdsh") and shutil.which("setpriv"):
        started.append(_pdsh(relay))
    for process in started:
        console, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode == EXIT_USER_ERROR and "optimizer.unknown" in console, console

"""Hosts made of Linux namespaces: each has its own network, host name, `/etc/hosts` and process tree.

A switch (a bridge in a namespace of its own) joins them. Nothing of the machine changes, and everything disappears with
the test process. All hosts see the machine's file system, like hosts that share one.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from arc_ds.system.processes import die_with_parent
from tests.helpers.waiting import LIMIT_S

INTERFACE = "eth0"
_LIBC = ctypes.CDLL(None, use_errno=True)
_PID_NAMESPACE = 0x20000000
_PORT = "port{}"
# Process 1 of a host must reap orphans, which bash does while it waits.
_INIT = """
hostname "$1"
mount -t proc proc /proc
mount --bind "$2" /etc/hosts
ip link set lo up
echo ready
sleep infinity & wait $!
"""


def missing(*programs: str) -> str | None:
    """The reason why this machine cannot make hosts, or lacks one of `programs`; None if all is there."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "only root can make network namespaces"
    absent = [name for name in ("ip", "unshare", *programs) if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed"
    probe = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "ip", "link", "add", "br0", "type", "bridge"]
    done = subprocess.run(probe, capture_output=True, text=True)
    return None if done.returncode == 0 else f"namespaces cannot be made here: {done.stderr.strip()}"


@dataclass(frozen=True)
class Host:
    """A host.

    name: its host name, which the other hosts can resolve.
    address: its IPv4 address on INTERFACE.
    number: its number, from 0.
    """

    name: str
    address: str
    number: int
    _init: int  # process number of its process 1
    _switch: int  # the same of the switch
    _pid_namespace: str

    def start(
        self,
        command: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        **more: Any,
    ) -> subprocess.Popen[str]:
        """Start a program on this host; stdout contains its whole console output. It ends with the test process.

        env: the whole environment; None means that of the test process.
        more: further arguments of Popen.
        """
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **more}
        own = os.open("/proc/self/ns/pid", os.O_RDONLY)
        there = os.open(f"/proc/{self._init}/ns/pid", os.O_RDONLY)
        others = [os.open(f"/proc/{self._init}/ns/{kind}", os.O_RDONLY) for kind in ("net", "uts", "mnt")]
        try:
            # A process enters a process namespace only by its birth.
            _enter(there, _PID_NAMESPACE)
            enter = partial(_become_member, others, cwd or Path.cwd())
            return subprocess.Popen(list(map(str, command)), env=env, preexec_fn=enter, **options)
        finally:
            _enter(own, _PID_NAMESPACE)
            for each in (own, there, *others):
                os.close(each)

    def run(self, command: Sequence[str | Path], **options: Any) -> tuple[int, str]:
        """Run a program on this host to its end; return its exit code and console output. Options as in `start`."""
        process = self.start(command, **options)
        console, _ = process.communicate(timeout=LIMIT_S)
        return process.returncode, console

    def processes(self) -> dict[int, str]:
        """The command lines of the living processes of this host by number (as seen by the test process).

        Process 1 and its `sleep` are left out.
        """
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(folder / "ns/pid") == self._pid_namespace:
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            except OSError:
                continue
        return {pid: words for pid, words in found.items() if words and pid != self._init and words != "sleep infinity"}

    def cut(self) -> None:
        """Pull the cable at the switch. The other hosts notice nothing but silence."""
        _in_switch(self._switch, f"ip link set {_PORT.format(self.number)} down")

    def restore(self) -> None:
        """Plug the cable in again."""
        _in_switch(self._switch, f"ip link set {_PORT.format(self.number)} up")

    def kill_processes(self) -> None:
        """End every process of the host but process 1 by SIGKILL, and wait until they are gone."""
        while found := self.processes():
            for pid in found:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)


@contextmanager
def make_hosts(folder: Path) -> Iterator[tuple[Host, ...]]:
    """Two hosts, `node0` and `node1`, on one switch. Check `missing()` first.

    folder: place for the hosts' `/etc/hosts`.
    """
    names = {"node0": "10.77.0.1", "node1": "10.77.0.2"}
    table = folder / "etc_hosts"
    table.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in names.items()))
    with ExitStack() as stack:
        switch = stack.enter_context(_namespaces("node-switch", table))
        _in_switch(switch, "ip link add bridge type bridge && ip link set bridge up")
        hosts = []
        for number, (name, address) in enumerate(names.items()):
            init = stack.enter_context(_namespaces(name, table))
            port = _PORT.format(number)
            _in_switch(switch, f"ip link add {port} type veth peer name {INTERFACE} netns {init}")
            _in_switch(switch, f"ip link set {port} master bridge up")
            address_it = f"ip address add {address}/24 dev {INTERFACE} && ip link set {INTERFACE} up"
            subprocess.run(["nsenter", f"--net=/proc/{init}/ns/net", "sh", "-c", address_it], check=True)
            hosts.append(Host(name, address, number, init, switch, os.readlink(f"/proc/{init}/ns/pid")))
        yield tuple(hosts)


@contextmanager
def _namespaces(name: str, table: Path) -> Iterator[int]:
    """New namespaces; gives the number of their process 1. The kernel kills all their processes at the end."""
    command = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", _INIT, "init"]
    holder = subprocess.Popen(
        [*command, name, str(table)], stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent
    )
    try:
        assert holder.stdout.readline() == "ready\n"
        yield int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text())
    finally:
        holder.kill()
        holder.communicate()


def wait_until(condition: Callable[[], Any], what: str, process: subprocess.Popen[str] | None = None) -> None:
    """Wait for an event. Fails after LIMIT_S, or if `process` ends before it, with that process's output."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"did not happen: {what}"
        if process is not None and process.poll() is not None and not condition():
            console = process.communicate()[0]
            raise AssertionError(f"ended with {process.returncode} before {what}:\n{console}")
        time.sleep(0.05)


def _in_switch(switch: int, command: str) -> None:
    # `ip` names other namespaces by process number, so it stays among the machine's processes.
    subprocess.run(["nsenter", f"--net=/proc/{switch}/ns/net", "sh", "-c", command], check=True)


def _become_member(namespaces: Sequence[int], cwd: Path) -> None:
    for each in namespaces:
        _enter(each, 0)
    os.chdir(cwd)  # entering a mount namespace moves to its root
    die_with_parent()


def _enter(namespace: int, kind: int) -> None:
    if _LIBC.setns(namespace, kind) != 0:
        raise OSError(ctypes.get_errno(), "setns")

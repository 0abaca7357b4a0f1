"""The hosts of the tests are what the tests take them for."""

from __future__ import annotations

import os
import signal
import sys

from tests.helpers.hosts import Host, wait_until

_CALL = "import socket, sys; socket.create_connection((sys.argv[1], 4000), timeout=float(sys.argv[2]))"
_ANSWER = "import socket; s = socket.create_server(('', 4000)); print('up', flush=True); [s.accept() for _ in range(9)]"


def _reaches(caller: Host, callee: Host, timeout_s: float = 60.0) -> bool:
    return caller.run([sys.executable, "-c", _CALL, callee.name, str(timeout_s)])[0] == 0


def test_hosts_reach_each_other_by_name_until_the_cable_is_pulled(hosts: tuple[Host, ...]) -> None:
    here, there = hosts
    server = there.start([sys.executable, "-c", _ANSWER])
    assert server.stdout is not None
    assert server.stdout.readline() == "up\n"
    assert there.run(["hostname"])[1].strip() == there.name
    assert _reaches(here, there)
    there.cut()
    assert not _reaches(here, there, timeout_s=1.0)
    there.restore()
    assert _reaches(here, there)
    assert not _reaches(here, here, timeout_s=1.0), "the hosts share ports"
    assert list(there.processes()) == [server.pid]
    assert not here.processes()
    server.send_signal(signal.SIGTERM)
    assert server.wait() == -signal.SIGTERM
    assert not there.processes()


def test_a_host_keeps_orphans_as_its_own_processes(hosts: tuple[Host, ...]) -> None:
    here, _ = hosts
    command = ["sh", "-c", "sleep 1000 >/dev/null 2>&1 & pwd"]
    code, console = here.run(command, cwd=os.path.dirname(__file__), env={"PATH": os.environ["PATH"]})
    assert (code, console.strip()) == (0, os.path.dirname(__file__))
    assert list(here.processes().values()) == ["sleep 1000"]
    here.kill_processes()
    wait_until(lambda: not here.processes(), "the end of all processes")

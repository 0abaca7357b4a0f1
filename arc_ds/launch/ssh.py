"""`arc-ds train --hostfile`: one ssh connection per host, each of which runs `arc_ds.launch.remote`.

DeepSpeed starts other hosts with pdsh, which passes few environment variables, splits values at spaces, and forwards no
signal. Here everything but the interpreter's path travels through the standard input of ssh as JSON, so no shell quotes
it and no process list shows it. Later lines of that stream are signals. Its end is the end of this process or of the
connection: the ranks then save and stop.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from arc_ds.errors import ConfigError
from arc_ds.launch.exit_codes import EXIT_LOST_RANK, EXIT_OK, EXIT_PREEMPTED, EXIT_USER_ERROR, joint_exit_code
from arc_ds.launch.order import BEAT_S, FORWARDED, GRACE_S, HELLO, Order, Place
from arc_ds.launch.signals import handled
from arc_ds.system.processes import die_with_parent
from arc_ds.system.user_files import read_user_text

logger = logging.getLogger(__name__)

_POLL_S = 0.1
# Lower than the ports that systems hand out by themselves.
_PORTS = range(20000, 30000)
_SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=30")
# A minute of silence is a lost connection.
_ALIVE = ("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4")
_SSH_FAILED = 255
# Variables of a host or a login. The other hosts have values of their own.
_OF_HOSTS = re.compile(
    r"HOME|USER|LOGNAME|SHELL|SHLVL|MAIL|PWD|OLDPWD|HOSTNAME|TERM|TMPDIR|TMP|TEMP|DISPLAY|_|MASTER_PORT|"
    r"(CUDA|HIP|ROCR|ZE|ASCEND_RT)_\w*VISIBLE\w*|(SSH|XDG|DBUS|SLURM|PMI|PMIX)_.*"
)
_OWN_ADDRESSES = ("localhost", "127.0.0.1", "::1")
_LINE = re.compile(r"(?P<host>\S+)\s+slots\s*=\s*(?P<slots>\d+)")


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Number of ranks by host, in the order of the file. ConfigError names the line that is wrong.

    The format is DeepSpeed's: `HOST slots=N`, comments after `#`.
    """
    text = read_user_text(Path(path), ConfigError, remedy="Give --hostfile a file with lines `HOST slots=N`.")
    slots: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        found = _LINE.fullmatch(words)
        if found is None or found["host"].startswith("-") or int(found["slots"]) < 1:
            raise ConfigError(f"{path}:{number} is `{words}`, expected `HOST slots=N` with N of at least 1")
        if found["host"] in slots:
            raise ConfigError(
                f"{path}:{number} lists {found['host']} again; give each host one line with all its slots"
            )
        slots[found["host"]] = int(found["slots"])
    if not slots:
        raise ConfigError(f"--hostfile {path} lists no host. Write one line `HOST slots=N` for each host.")
    if len(slots) > 1 and _address_of_first(slots) in _OWN_ADDRESSES:
        raise ConfigError(
            f"--hostfile {path} lists {next(iter(slots))} first, so each of the other hosts would look for rank 0 on "
            "itself. Write the name by which they reach that host."
        )
    return slots


def _address_of_first(slots: Mapping[str, int]) -> str:
    """The address at which the ranks meet. ssh alone needs a login name."""
    return next(iter(slots)).rpartition("@")[2]


def launch_on_hosts(
    module: str, arguments: Sequence[str], *, slots: Mapping[str, int], device_request: str = "auto"
) -> int:
    """Run `module.main(arguments)` on `slots[host]` ranks of each host and return the run's exit code.

    It is the code of a host that failed by itself; EXIT_PREEMPTED if one was preempted; otherwise EXIT_OK.
    """
    port = os.environ.get("MASTER_PORT") or str(random.SystemRandom().choice(_PORTS))
    if not port.isdecimal():
        raise ConfigError(f"MASTER_PORT is {port!r}, expected the number of a free port on the first host")
    environment = {name: value for name, value in os.environ.items() if not _OF_HOSTS.fullmatch(name)}
    asked: list[signal.Signals] = []
    connections: list[_Connection] = []
    with handled(FORWARDED, lambda number, _frame: asked.append(signal.Signals(number))):
        try:
            for host_idx, host in enumerate(slots):
                order = Order(
                    folder=os.getcwd(),
                    environment=environment,
                    module=module,
                    arguments=list(arguments),
                    place=Place(tuple(slots.values()), host_idx, _address_of_first(slots), int(port)),
                    device_request=device_request,
                )
                connections.append(_Connection(host, order))
            return _until_end(connections, asked)
        finally:
            for connection in connections:
                connection.process.kill()


class _Connection:
    """A host with its ssh process. Threads write to and read from it, so that a slow host delays no other."""

    def __init__(self, host: str, order: Order) -> None:
        self.host = host
        self.has_started = False
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._lines.put(json.dumps(order._asdict()))
        self.process = subprocess.Popen(
            [*_SSH, *_ALIVE, host, _remote_command()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal must not end it
            preexec_fn=die_with_parent,
        )
        self._reader = threading.Thread(target=self._read, daemon=True, name=f"read {host}")
        self._reader.start()
        threading.Thread(target=self._write, daemon=True, name=f"write {host}").start()

    def send(self, number: signal.Signals) -> None:
        """Let the launcher on the host send itself a signal."""
        self._lines.put(number.name)

    def exit_code(self) -> int | None:
        """Exit code of the host's ranks; None while they run. The host's output is complete then."""
        if self.process.poll() is None:
            return None
        self._reader.join(GRACE_S)
        if not self.has_started:
            return EXIT_USER_ERROR
        return EXIT_LOST_RANK if self.is_lost() else self.process.returncode

    def is_lost(self) -> bool:
        """Whether ssh ended without an exit code of the host."""
        return self.process.returncode == _SSH_FAILED or self.process.returncode < 0

    def _write(self) -> None:
        assert self.process.stdin is not None
        line = self._lines.get()
        try:
            while True:
                self.process.stdin.write(f"{line}\n".encode())
                self.process.stdin.flush()
                try:
                    line = self._lines.get(timeout=BEAT_S)
                except queue.Empty:
                    line = ""
        except OSError:
            return  # ssh has ended, which `exit_code` tells

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            words = line.decode(errors="replace")
            if words.rstrip().endswith(HELLO):  # a login file may have printed words without an end of line
                self.has_started = True
            else:
                with suppress(OSError):  # nobody reads any more; ssh must not wait for it
                    sys.stderr.write(f"{self.host}: {words.rstrip()}\n")


def _remote_command() -> str:
    """Command line for the login shell of a host, whichever shell that is."""
    path = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return shlex.join(["env", f"PYTHONPATH={os.pathsep.join(path)}", sys.executable, "-m", "arc_ds.launch.remote"])


def _until_end(connections: Sequence[_Connection], asked: list[signal.Signals]) -> int:
    """Forward signals until all hosts have ended, and end hosts that outlive a failed one. Return the exit code."""
    codes: dict[str, int] = {}
    has_failed, is_quitting, deadline = False, False, float("inf")
    while len(codes) < len(connections):
        while asked:
            _send(connections, codes, asked.pop(0))
        for connection in connections:
            code = connection.exit_code() if connection.host not in codes else None
            if code is None:
                continue
            codes[connection.host] = code
            if code == EXIT_PREEMPTED:
                _send(connections, codes, signal.SIGTERM)  # others may still wait for this host's ranks
            elif code != EXIT_OK and not has_failed:
                has_failed, deadline = True, time.monotonic() + GRACE_S
                logger.error("%s", _in_words(connection, code))
        if time.monotonic() > deadline:
            if is_quitting:  # cut off: ssh itself would wait for another minute
                for connection in connections:
                    connection.process.kill()
            _send(connections, codes, signal.SIGQUIT)
            is_quitting, deadline = True, time.monotonic() + GRACE_S
        time.sleep(_POLL_S)
    return joint_exit_code(list(codes.values()))


def _send(connections: Sequence[_Connection], codes: Mapping[str, int], number: signal.Signals) -> None:
    for connection in connections:
        if connection.host not in codes:
            connection.send(number)


def _in_words(connection: _Connection, code: int) -> str:
    host = connection.host
    if not connection.has_started and connection.is_lost():
        return f"{host} cannot be reached: ssh's message is above. `ssh -o BatchMode=yes {host} true` must succeed."
    if not connection.has_started:
        return (
            f"{host} cannot run {sys.executable}: see above. All hosts need the same virtual environment in one place."
        )
    if connection.is_lost():
        return f"{host} is lost: its connection or launcher ended. The same command resumes from the last checkpoint."
    return f"{host} failed first, with exit code {code}"

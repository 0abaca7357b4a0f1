"""A rank stops when one of its launchers dies: it saves at the next step boundary and ends with EXIT_PREEMPTED.

DeepSpeed's launchers do not pass a signal or their own death on: `deepspeed` leaves its per-host launcher running, and
that one leaves the ranks. Uses the standard library alone, because a rank starts this before its imports.
"""

from __future__ import annotations

import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

# Time to save after the stop signal. A rank that still runs then waits for something that will not come.
STOP_LIMIT_S = 600.0
_LAUNCHERS = ("deepspeed", "ds", "torchrun")
_LAUNCHER_MODULES = (
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "torch.distributed.run",
    "torch.distributed.launch",
)
# The server's process of an ssh session without a terminal, as pdsh opens it. It ends with the connection.
_SSH_SESSION = re.compile(r"sshd(-session)?: \S+@notty")


def stop_with_launchers(more: Sequence[int] = ()) -> None:
    """Send this process SIGTERM when its parent, a launcher further above it, or a process of `more` ends.

    After STOP_LIMIT_S it is killed. Call it after `hold_stop_signals`, so that the signal waits for the training loop.
    """
    watched = dict.fromkeys([os.getppid(), *_launchers_above(os.getpid()), *more])

    def wait_and_stop() -> None:
        ended = _wait_for_first([pid for pid in watched if pid > 0])  # 0: a process outside this process namespace
        _drop_broken_output()
        with suppress(OSError):
            sys.stderr.write(f"rank {os.environ.get('RANK')}: its launcher (process {ended}) has ended; stopping\n")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(STOP_LIMIT_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait_and_stop, daemon=True, name="stop-with-launchers").start()


def _launchers_above(pid: int) -> Iterator[int]:
    """Process numbers of the launchers among the ancestors of a process. Empty if there is no /proc."""
    survives_ssh = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # nohup
    with suppress(OSError):
        while (pid := _parent_of(pid)) > 0:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
            if is_launcher(command) or (_SSH_SESSION.match(command[0]) and not survives_ssh):
                yield pid


def is_launcher(command: Sequence[str]) -> bool:
    """Whether a command line is one of DeepSpeed's or torch's: `python .../torchrun` or `python -m MODULE`."""
    for idx, word in enumerate(command[:4]):
        if word == "-c":
            return False
        if word == "-m":
            return command[idx + 1 : idx + 2] != [] and command[idx + 1] in _LAUNCHER_MODULES
        if not word.startswith("-") and Path(word).name in _LAUNCHERS:
            return True
    return False


def _drop_broken_output() -> None:
    """Send output to /dev/null if its reader ended with the launcher. Otherwise the next `print` would fail."""
    for descriptor in (1, 2):
        output = select.poll()
        output.register(descriptor, 0)
        if output.poll(0):  # reports errors only
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _parent_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/stat").read_text()
    return int(status.rpartition(")")[2].split()[1])


def _wait_for_first(pids: Sequence[int]) -> int:
    """Return the first of the processes that no longer exists. With pidfd, an unreaped zombie counts as gone."""
    ends, pid_of = select.poll(), {}
    for pid in pids:
        try:
            pid_of[descriptor := os.pidfd_open(pid)] = pid
        except ProcessLookupError:
            return pid
        except (AttributeError, OSError):  # another system than Linux, or a kernel before 5.3
            return _poll_for_first(pids)
        ends.register(descriptor, select.POLLIN)
    return pid_of[ends.poll()[0][0]]


def _poll_for_first(pids: Sequence[int]) -> int:
    while True:
        for pid in pids:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return pid
            except PermissionError:  # another user's process, which is there
                continue
        time.sleep(1.0)

"""The ranks of real runs on the hosts, seen from outside."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from arc_ds.launch.signals import STOP_SIGNALS
from tests.helpers.hosts import Host, wait_until

_RANK = re.compile(r"\S*python\S* (-u )?-m arc_ds\.(train|launch\.rank) ")


def ranks(host: Host) -> list[int]:
    """Process numbers of the ranks on a host."""
    return [pid for pid, words in host.processes().items() if _RANK.match(words)]


def stop_between_steps(hosts: Iterable[Host], send: Callable[[], None], has_arrived: Callable[[], bool]) -> None:
    """Send a stop while all ranks are frozen: on a fast machine they would end the run before it arrives."""
    frozen = [pid for host in hosts for pid in ranks(host)]
    assert frozen
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    send()
    wait_until(has_arrived, "the arrival of the stop")
    for pid in frozen:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def has_stop_signal(pid: int) -> bool:
    """Whether a frozen process has received a stop signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    pending = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in pending for number in STOP_SIGNALS)

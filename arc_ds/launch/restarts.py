"""`arc-ds train --restarts N`: start a failed run again from its last whole checkpoint.

A restart helps against causes that pass: a rank was lost, a step stalled, or the run failed for an unknown reason. It
does not help against a user's mistake, bad data, too little memory, a diverged run or a full disk. A stop on request is
no failure.
"""

from __future__ import annotations

import logging
import select
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from arc_ds.errors import ArcError, ConfigError, LostRankError
from arc_ds.launch.exit_codes import EXIT_FAILED, EXIT_LOST_RANK, EXIT_PREEMPTED, EXIT_STALLED, exit_code_of
from arc_ds.launch.signals import STOP_SIGNALS, handled, received_signals

logger = logging.getLogger(__name__)

# Causes against which a restart helps, in words.
HELPED = {EXIT_FAILED: "failed", EXIT_LOST_RANK: "a rank or host was lost", EXIT_STALLED: "stalled"}
_LONGEST_PAUSE_S = 60.0
_PROBE_S = 15


def with_restarts(start: Callable[[int], int], num_restarts: int) -> int:
    """Call `start`, and again while it fails with a code of HELPED, and return its last exit code.

    The pause before restart n is 2 ** (n - 1) seconds, at most a minute. After a stop signal there is no restart. In a
    pause, and if `start` has no handler of its own, it exits with EXIT_PREEMPTED: no rank is running then.

    start: starts the run and waits for it; its argument is the number of the restart (0: first start).
    num_restarts: maximum number of restarts.
    """
    with handled(STOP_SIGNALS, lambda *_: sys.exit(EXIT_PREEMPTED)), received_signals() as stops:
        for number in range(num_restarts + 1):
            error: ArcError | None = None
            try:
                code = start(number)
            except ArcError as caught:
                error, code = caught, exit_code_of(caught)
            if code not in HELPED or number == num_restarts or select.select([stops], [], [], 0.0)[0]:
                break
            if error is not None:
                logger.error("%s", error)
            pause_s = min(2.0 ** min(number, 10), _LONGEST_PAUSE_S)  # a float has no 2 ** 1024
            logger.warning(
                "the run ended with code %d (%s); restart %d of %d in %.0f s, from its last whole checkpoint",
                *(code, HELPED[code], number + 1, num_restarts, pause_s),
            )
            time.sleep(pause_s)
        if error is not None:
            raise error
        return code


def choose_hosts(
    slots: Mapping[str, int], answering: Collection[str], *, batch_size: int, micro_batches: int, min_hosts: int
) -> dict[str, int]:
    """The hosts for the next start: as many of those that answer, in order, as divide the batch.

    slots: number of ranks of each host.
    min_hosts: minimum number of hosts, at least 1.

    Raises LostRankError if fewer hosts answer, and ConfigError if no such number of ranks divides the batch.
    """
    usable = [host for host in slots if host in answering]
    if len(usable) < min_hosts:
        absent = ", ".join(host for host in slots if host not in answering)
        raise LostRankError(
            f"{len(usable)} of {len(slots)} hosts answer (not {absent}), and the run needs {min_hosts}. Repair them, "
            "or go on with fewer hosts (--min-hosts)."
        )
    for number in range(len(usable), min_hosts - 1, -1):
        chosen = {host: slots[host] for host in usable[:number]}
        if batch_size % (sum(chosen.values()) * micro_batches) == 0:
            return chosen
    raise ConfigError(
        f"no number of hosts from --min-hosts = {min_hosts} to {len(usable)} has ranks × micro_batches (ranks × "
        f"{micro_batches}) that divides data.batch_size = {batch_size}. Lower --min-hosts, or change one of them."
    )


def answering_hosts(hosts: Sequence[str]) -> set[str]:
    """The hosts that ssh reaches without a password within 15 s."""
    probe = ("ssh", "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_PROBE_S}")
    probes = {host: subprocess.Popen([*probe, host, "true"], stdin=subprocess.DEVNULL) for host in hosts}
    answered, deadline = set(), time.monotonic() + 2 * _PROBE_S
    for host, process in probes.items():
        try:
            if process.wait(max(0.0, deadline - time.monotonic())) == 0:
                answered.add(host)
        except subprocess.TimeoutExpired:
            process.kill()
    return answered

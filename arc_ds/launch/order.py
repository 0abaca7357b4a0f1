"""The order that `launch.ssh`, which launches a run on several hosts, sends to `launch.remote` on each of them."""

from __future__ import annotations

import signal
from typing import NamedTuple

from arc_ds.launch.signals import STOP_SIGNALS

# Time for other ranks and hosts to end after the first failed: enough to report the same error.
GRACE_S = 10.0
# Signals that a launcher passes on. SIGQUIT (Ctrl-\\) kills the ranks at once.
FORWARDED = (*STOP_SIGNALS, signal.SIGQUIT)

# First line of a host's output.
HELLO = "arc_ds.launch.remote has started"
# Time between lines of the launching process; an empty line only says that it is alive.
BEAT_S = 10.0
# Silence after which a host takes the launching process for lost. It is also silent while it is suspended (Ctrl-Z).
LOST_S = 60.0


class Place(NamedTuple):
    """The place of a host in its run.

    num_procs: number of ranks of each host.
    host_idx: this host's index in it.
    address: address of the first host.
    port: a free port there.
    """

    num_procs: tuple[int, ...]
    host_idx: int
    address: str
    port: int


class Order(NamedTuple):
    """The task of one host.

    folder: working folder.
    environment: variables that are set there.
    module, arguments: `module.main(arguments)` runs on each rank.
    place: place of the host in the run.
    device_request: the config's device.
    """

    folder: str
    environment: dict[str, str]
    module: str
    arguments: list[str]
    place: Place
    device_request: str

"""The launcher of one host under `arc_ds.launch.ssh`, which gives its order through standard input."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from arc_ds.errors import ArcError, ConfigError
from arc_ds.launch.exit_codes import EXIT_PREEMPTED, exit_code_of
from arc_ds.launch.order import FORWARDED, HELLO, LOST_S, Order, Place
from arc_ds.launch.wrapper import choose_num_procs, launch
from arc_ds.system import dist

logger = logging.getLogger(__name__)


def main() -> int:
    """Carry out the order; return the exit code of this host's ranks."""
    dist.setup_logging()
    for number in FORWARDED:  # until `launch` handles them
        signal.signal(number, lambda *_: sys.exit(EXIT_PREEMPTED))
    commands = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # no program of the ranks may read the commands
    order = _read_order(commands)
    print(HELLO, flush=True)
    with _relayed_output():
        threading.Thread(target=_obey, args=(commands,), daemon=True, name="obey").start()
        try:
            return _launch(order)
        except ArcError as error:
            logger.error("%s", error)
            return exit_code_of(error)


def _read_order(commands: int) -> Order:
    with open(commands, "rb", buffering=0, closefd=False) as stream:
        fields = json.loads(stream.readline())
    return Order(**{**fields, "place": Place(*fields["place"])})


def _launch(order: Order) -> int:
    try:
        os.chdir(order.folder)
    except OSError as error:
        raise ConfigError(
            f"{order.folder}, where `arc-ds train` was started, cannot be entered here: {error.strerror}. Start "
            "it in a folder that all hosts share."
        ) from error
    os.environ.update(order.environment)
    requested = order.place.num_procs[order.place.host_idx]
    num_procs = choose_num_procs(requested, order.device_request, "the number of slots in the hostfile")
    return launch(
        order.module, order.arguments, num_procs=num_procs, device_request=order.device_request, place=order.place
    )


def _obey(commands: int) -> None:
    """Send this process the signals that the launching process names, and SIGTERM when that one is lost."""
    rest = b""
    while select.select([commands], [], [], LOST_S)[0] and (text := os.read(commands, 1 << 16)):
        *lines, rest = (rest + text).split(b"\n")
        for name in filter(None, lines):
            os.kill(os.getpid(), signal.Signals[name.decode()])
    logger.warning("%s: the launching process or its connection is lost; the ranks save and stop", socket.gethostname())
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _relayed_output() -> Iterator[None]:
    """Pass on the output of this process and its ranks. Drop it if nobody reads: no rank may fail at a `print`."""
    console = os.fdopen(os.dup(1), "wb")
    read_end, write_end = os.pipe()
    for descriptor in (1, 2):
        os.dup2(write_end, descriptor)
    os.close(write_end)

    def relay() -> None:
        while text := os.read(read_end, 1 << 16):
            with suppress(OSError):
                console.write(text)
                console.flush()

    thread = threading.Thread(target=relay, daemon=True, name="relay")
    thread.start()
    try:
        yield
    finally:
        for descriptor in (1, 2):  # the last writers, so that `relay` ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        thread.join(LOST_S)


if __name__ == "__main__":
    sys.exit(main())

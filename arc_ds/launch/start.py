"""Before training begins, a stop signal ends the process at once, and a long wait is logged every minute.

A rank that waits for other ranks waits in C code: no signal handler of Python runs there, and torch gives up only after
minutes. Nothing is to be saved yet, so a signal may end the process. Evaluations end in
the same way, because their finished batches are on disk.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from arc_ds.launch.exit_codes import EXIT_PREEMPTED
from arc_ds.launch.signals import STOP_SIGNALS
from arc_ds.launch.status import end_now

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_WORD_EVERY_S = 60.0


@contextmanager
def stoppable(
    doing: str,
    level: int = logging.INFO,
    *,
    message: str = "stopped before training began, while {doing}; there is nothing to save",
) -> Iterator[None]:
    """A block in which a held stop signal ends this process with EXIT_PREEMPTED.

    doing: the block in words, logged every minute.
    level: level of that message. Rank 0 alone logs below WARNING.
    message: the message of a stop.
    """
    is_over = threading.Event()
    watch = threading.Thread(target=_watch, args=(doing, level, message, is_over), daemon=True, name="stoppable")
    watch.start()
    try:
        yield
    finally:
        is_over.set()
        watch.join()


def _watch(doing: str, level: int, message: str, is_over: threading.Event) -> None:
    started = last = time.monotonic()
    while not is_over.wait(_POLL_S):
        pending = signal.sigpending() & set(STOP_SIGNALS)
        if pending:
            names = ", ".join(signal.Signals(number).name for number in pending)
            # The main thread is blocked in C code.
            logger.warning("%s: %s", names, message.format(doing=doing))
            end_now(EXIT_PREEMPTED)
        if time.monotonic() - last > _WORD_EVERY_S:
            last = time.monotonic()
            logger.log(level, "still %s, for %.0f s", doing, last - started)

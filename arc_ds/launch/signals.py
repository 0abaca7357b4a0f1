"""Stopping a run on purpose: a signal sets a flag, and all ranks agree on it at a step boundary.

The signal handler only sets the flag. The DeepSpeed launcher signals ranks one after another; if a rank saved inside
its handler, it would wait in a collective for ranks that are still training, and the run would hang.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType

# Ctrl-C is a stop like the others: the terminal sends it to DeepSpeed's and torch's launchers and to their ranks.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """A request to save and stop the run, set by a signal.

    Use it as a context manager around the training loop, in the main thread only (Python's rule for signal handlers).
    At its end it restores the previous handlers unless signals were held before. A rank holds stop signals outside the
    block (`hold_stop_signals`). Before the block `stoppable` ends the rank at a signal, and a signal that arrives while
    the run closes does not interrupt that. Ranks exchange their received signals together with the label counts of a
    step (`step.train_step`).

    Python runs a handler in the main thread, between two of its own instructions. A main thread that is blocked in a
    collective never runs it, so another thread reads the signals too (`unanswered_since`).
    """

    def __init__(self) -> None:
        self._is_set = False
        self._since: float | None = None
        self._is_answered = False
        self._stack = ExitStack()
        self._received: int | None = None  # descriptor of `received_signals`

    def __enter__(self) -> StopRequest:
        self._received = self._stack.enter_context(received_signals())
        self._former = {number: signal.signal(number, self.set) for number in STOP_SIGNALS}
        self._former_mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._former_mask)
        for number, handler in self._former.items():
            # Threads started inside the block (autograd, data loader) do not block the signals. The default action
            # could still end the process through one of them, so our handler stays if signals were held.
            if number not in self._former_mask:
                signal.signal(number, handler)
        self._received = None
        self._stack.close()

    def unanswered_since(self) -> float | None:
        """Time of the first stop signal (`time.monotonic`); None if there was none or all ranks have agreed to stop.

        One thread must call this regularly: the first call after the signal notes the time.
        """
        if self._since is None and self._received is not None:
            with suppress(BlockingIOError):
                if any(number in STOP_SIGNALS for number in os.read(self._received, 64)):
                    self._since = time.monotonic()
        return None if self._is_answered else self._since

    def answer(self) -> None:
        """All ranks have agreed to stop."""
        self._is_answered = True

    def is_set(self) -> bool:
        """Whether this rank has received a stop signal."""
        return self._is_set

    def set(self, *_: object) -> None:
        """Request the stop. The signals' handler."""
        self._is_set = True


def hold_stop_signals() -> None:
    """Defer stop signals until a `StopRequest` opens; otherwise they could end the process anywhere.

    Call it first in a rank, before other threads start: threads and child processes inherit the signal mask.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


@contextmanager
def handled(numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """A block in which `handler` handles these signals."""
    former = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, former_handler in former.items():
            signal.signal(number, former_handler)


@contextmanager
def received_signals() -> Iterator[int]:
    """A descriptor that yields the number of each signal that has a Python handler. Reading it does not block.

    The number arrives even while the main thread is blocked in C code and its handler cannot run.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    os.set_blocking(write_end, False)
    former = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    try:
        yield read_end
    finally:
        signal.set_wakeup_fd(former)
        os.close(read_end)
        os.close(write_end)

"""Stopping a run on purpose: a signal sets a flag, and all ranks agree on it at a step boundary.

The signal handler only sets the flag. The DeepSpeed launcher signals ranks one after another; if a rank saved inside
its handler, it would wait in a collective for ranks that are still training, and the run would hang.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import FrameType
from typing import Any, TypeVar

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_POLL_S = 0.1
_T = TypeVar("_T")


class StopRequest:
    """A request to save and stop the run, set by a signal.

    Use it as a context manager around the training loop, in the main thread only (Python's rule for signal handlers).
    At its end it restores the previous handlers unless signals were held before. A rank holds stop signals outside the
    block (`hold_stop_signals`). A signal that arrives while weights are loading is delivered at the start of the block,
    and a signal that arrives while the run closes does not interrupt that. Ranks exchange their received signals
    together with the label counts of a step (`step.train_step`).
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = STOP_SIGNALS) -> None:
        self._signals = signals
        self._received: int | None = None
        self._former: dict[signal.Signals, Any] = {}
        self._former_mask: set[signal.Signals] = set()

    def __enter__(self) -> StopRequest:
        for number in self._signals:
            self._former[number] = signal.signal(number, self._on_signal)
        self._former_mask = set(signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals))  # type: ignore[arg-type]
        return self

    def __exit__(self, *_: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._former_mask)
        for number, handler in self._former.items():
            # Threads started inside the block (autograd, data loader) do not block the signals. The default action
            # could still end the process through one of them, so our handler stays if signals were held.
            if number not in self._former_mask:
                signal.signal(number, handler)
        self._former.clear()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._received = number

    @property
    def received(self) -> str | None:
        """Name of the signal that this rank has received, or None."""
        return None if self._received is None else signal.Signals(self._received).name

    def wait_for(self, call: Callable[[], _T]) -> _T | None:
        """Run `call` in a separate thread and return or raise its outcome; return None as soon as a stop is requested.

        Use it for slow calls whose result a stopping run does not need. After a stop the thread continues in the
        background. It must not hold anything that the rest of the run needs. It does not keep the process alive.
        """
        outcome: Future[_T] = Future()
        if self._received is None:
            threading.Thread(target=_settle, args=(outcome, call), daemon=True).start()
        while self._received is None:
            if wait([outcome], timeout=_POLL_S).done:
                return outcome.result()
        return None

    def set(self) -> None:
        """Request the stop without a signal (time limit, test)."""
        self._received = int(signal.SIGUSR1)


def _settle(outcome: Future[_T], call: Callable[[], _T]) -> None:
    try:
        outcome.set_result(call())
    except BaseException as error:  # the caller handles it
        outcome.set_exception(error)


def hold_stop_signals() -> None:
    """Defer stop signals until a `StopRequest` opens; otherwise their default action would end the process.

    Call it first in a rank, before other threads start: threads and child processes inherit the signal mask.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

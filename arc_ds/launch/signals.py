"""Stopping a run on purpose: a signal sets a flag, and all ranks agree on it at a step boundary (design 8.12).

A handler does nothing else. The DeepSpeed launcher signals ranks one after the other, so a rank that saved inside its
handler would wait in a collective for ranks that are still training, and the run would hang.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import FrameType
from typing import Any, TypeVar

from arc_ds.launch.exit_codes import EXIT_FAILED, EXIT_OK, EXIT_PREEMPTED, EXIT_USER_ERROR

__all__ = [
    "EXIT_FAILED",
    "EXIT_OK",
    "EXIT_PREEMPTED",
    "EXIT_USER_ERROR",
    "STOP_SIGNALS",
    "StopRequest",
    "die_with_parent",
    "hold_stop_signals",
]

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.1
_T = TypeVar("_T")


class StopRequest:
    """Whether this run has been asked to save and stop.

    Use as a context manager around the training loop; the former handlers come back at its end, unless signals were
    held. Only the main thread may enter it (Python's rule for signal handlers). A rank holds the signals outside the
    block (`hold_stop_signals`): one that came while the weights were loading is received at its start, and one that
    comes while the run closes does not cut that short. The ranks agree on what one of them has received with the count
    of a step's labels (`step.train_step`).
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
            # Threads made meanwhile (autograd's, the loader's) do not hold the signals: the default action would still
            # end the process through one of them, so our handler stays where signals were held.
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
        """What `call` returns or raises, in a thread of its own; None where the stop is asked for before that.

        For what may take long and is of no use to a run that stops. The thread is then left behind, with whatever it
        is at: it must hold nothing that the rest of the run needs, and it does not keep the process from ending.
        """
        outcome: Future[_T] = Future()
        if self._received is None:
            threading.Thread(target=_settle, args=(outcome, call), daemon=True).start()
        while self._received is None:
            if wait([outcome], timeout=_POLL_S).done:
                return outcome.result()
        return None

    def set(self) -> None:
        """Ask for the stop without a signal (a time limit, a test)."""
        self._received = int(signal.SIGUSR1)


def _settle(outcome: Future[_T], call: Callable[[], _T]) -> None:
    try:
        outcome.set_result(call())
    except BaseException as error:  # the caller's to handle
        outcome.set_exception(error)


def hold_stop_signals() -> None:
    """Let stop signals wait until a `StopRequest` opens; without it one would end the process by its default action.

    For the first lines of a rank, before other threads: they inherit the mask, and so does what the rank starts.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> bool:
    """Have the kernel signal this process when its parent dies, so that no rank outlives its launcher (Linux only).

    Returns whether it is set. Where the parent is already gone the process ends itself at once: the kernel's rule
    holds for deaths to come only. Note that "parent" is the *thread* that started this process (prctl(2)).
    """
    if not sys.platform.startswith("linux"):
        return False
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        logger.warning("cannot tie this process to its parent: %s", os.strerror(ctypes.get_errno()))
        return False
    if os.getppid() != parent:
        os.kill(os.getpid(), number)
    return True

"""Stopping a run on purpose: a signal sets a flag, and all ranks agree on it at a step boundary.

The signal handler only sets the flag. The DeepSpeed launcher signals ranks one after another; if a rank saved inside
its handler, it would wait in a collective for ranks that are still training, and the run would hang.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

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
    collective never runs it. So a second thread hears of the signal too (`unanswered_since`).
    """

    def __init__(self) -> None:
        self._is_set = False
        self._since: float | None = None
        self._is_answered = False
        self._wakeup: tuple[int, int] | None = None
        self._former: dict[signal.Signals, Any] = {}
        self._former_mask: set[signal.Signals] = set()

    def __enter__(self) -> StopRequest:
        self._wakeup = read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        self._former_wakeup = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(read_end,), daemon=True, name="stop-request").start()
        for number in STOP_SIGNALS:
            self._former[number] = signal.signal(number, self.set)
        self._former_mask = set(signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS))  # type: ignore[arg-type]
        return self

    def __exit__(self, *_: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._former_mask)
        for number, handler in self._former.items():
            # Threads started inside the block (autograd, data loader) do not block the signals. The default action
            # could still end the process through one of them, so our handler stays if signals were held.
            if number not in self._former_mask:
                signal.signal(number, handler)
        self._former.clear()
        signal.set_wakeup_fd(self._former_wakeup)
        assert self._wakeup is not None
        os.close(self._wakeup[1])  # ends the thread, which closes the other end

    def _hear(self, read_end: int) -> None:
        """Note the time of the first stop signal. The kernel's handler writes each signal's number to the pipe."""
        while numbers := os.read(read_end, 64):
            if self._since is None and any(number in STOP_SIGNALS for number in numbers):
                self._since = time.monotonic()
        os.close(read_end)

    def unanswered_since(self) -> float | None:
        """Time of the first stop signal (`time.monotonic`) if the ranks have not agreed to stop. For any thread."""
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

"""A stalled step leaves the stacks of every rank in the run folder (design 9)."""

from __future__ import annotations

import faulthandler
from pathlib import Path
from typing import IO


class Watchdog:
    """Writes this process's Python stacks, all threads, to a file when a step takes longer than `limit_s`.

    `alive()` starts the time anew; call it at each step, and around anything long that is not a step (validation, a
    checkpoint). The dump is made by a C thread, so it comes through while Python waits in a collective. It does not
    end the run: the backend's own time-out does. The file is empty as long as nothing has stalled, and each rank has
    its own. One watchdog a process (faulthandler has one timer).
    """

    def __init__(self, folder: Path, *, rank: int, limit_s: float) -> None:
        """`folder` is made where it is missing; `limit_s` > 0 in seconds."""
        if limit_s <= 0:
            raise ValueError(f"the watchdog's limit must be > 0 seconds, got {limit_s}")
        self.path = folder / f"stacks_rank_{rank:05d}.txt"
        self._limit_s = limit_s
        self._file: IO[str] | None = None

    def __enter__(self) -> Watchdog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Appending: the stacks of an earlier start of the same run may be what somebody is looking for.
        self._file = self.path.open("a", encoding="utf-8")
        self.alive()
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._file is not None:
            self._file.close()
            self._file = None

    def alive(self) -> None:
        """Something has been done: the limit counts from now. Does nothing outside the `with` block."""
        if self._file is not None:
            faulthandler.dump_traceback_later(self._limit_s, repeat=False, file=self._file)

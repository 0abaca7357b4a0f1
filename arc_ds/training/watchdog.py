"""Writes the stacks of every rank to the run folder if a step stalls."""

from __future__ import annotations

import faulthandler
from pathlib import Path
from typing import IO

from arc_ds.system.files import output


class Watchdog:
    """Writes the Python stacks of all threads of this process to a file if a step takes longer than `limit_s`.

    `alive()` restarts the timer. Call it at each step, and around long operations that are not steps (validation,
    checkpoint). A C thread writes the dump, so it works while Python waits in a collective. The watchdog does not end
    the run; the backend's own timeout does. Each rank has its own file, which stays empty unless something stalls. Use
    one watchdog per process because faulthandler has a single timer.
    """

    def __init__(self, folder: Path, *, rank: int, limit_s: float) -> None:
        """Does not write anything yet.

        folder: folder of the file; created if missing.
        limit_s: time limit in seconds, > 0.
        """
        self.path = folder / f"stacks_rank_{rank:05d}.txt"
        self._limit_s = limit_s
        self._file: IO[str] | None = None

    def __enter__(self) -> Watchdog:
        with output(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Append: stacks from an earlier start of the same run may still be needed.
            self._file = self.path.open("a", encoding="utf-8")
        self.alive()
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._file is not None:
            self._file.close()
            self._file = None

    def alive(self) -> None:
        """Restart the timer. Does nothing outside the `with` block."""
        if self._file is not None:
            faulthandler.dump_traceback_later(self._limit_s, repeat=False, file=self._file)

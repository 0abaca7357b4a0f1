"""A replacement of `arc_ds.train` for tests of launching: `main([MODE, FOLDER])` runs on every rank."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from arc_ds.launch.exit_codes import EXIT_OK, EXIT_PREEMPTED
from arc_ds.launch.signals import StopRequest


def main(arguments: list[str]) -> int:
    """Write this rank's pid and threads to FOLDER, then act according to MODE."""
    mode, folder = arguments
    rank = os.environ["RANK"]
    note = Path(folder) / f"pid_{rank}"
    temporary = Path(folder) / f"tmp_{rank}"
    temporary.write_text(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']} {os.environ['WORLD_SIZE']}")
    os.replace(temporary, note)
    return {"ok": _end_well, "train": _train, "die": _die, "crash": _crash}[mode](rank)


def _end_well(_rank: str) -> int:
    return EXIT_OK


def _train(_rank: str) -> int:
    """Run steps for up to an hour. A stop takes effect at the next step; closing exceeds the launcher's poll time."""
    time.sleep(0.5)
    with StopRequest() as stop:
        for _ in range(36_000):
            if stop.is_set():
                break
            time.sleep(0.1)
        else:
            return EXIT_OK
    time.sleep(2.0 * int(os.environ["RANK"]))
    return EXIT_PREEMPTED


def _die(rank: str) -> int:
    if rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return _train(rank)


def _crash(rank: str) -> int:
    if rank == "1":
        raise RuntimeError("rank one crashed")
    return _train(rank)

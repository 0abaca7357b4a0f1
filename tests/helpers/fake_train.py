"""A replacement of `arc_ds.train` for tests of launching: `main([MODE, FOLDER])` runs on every rank."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from arc_ds.launch.exit_codes import EXIT_OK, EXIT_PREEMPTED
from arc_ds.launch.signals import StopRequest

# Silence after which a rank counts as lost. A rank on a busy machine must send a byte in that time.
TIMEOUT_S = 20.0


def main(arguments: list[str]) -> int:
    """Write this rank's pid and threads to FOLDER, then act according to MODE."""
    mode, folder = arguments
    rank = os.environ["RANK"]
    note = Path(folder) / f"pid_{rank}"
    temporary = Path(folder) / f"tmp_{rank}"
    temporary.write_text(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']} {os.environ['WORLD_SIZE']}")
    os.replace(temporary, note)
    if mode == "ok":
        return EXIT_OK
    if mode not in ("train", "die", "crash"):
        return _train_together(mode, int(rank), Path(folder))
    if rank == "1" and mode == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == "1" and mode == "crash":
        raise RuntimeError("rank one crashed")
    return _train(int(rank))


def _train(rank: int) -> int:
    """Run steps for up to an hour. A stop takes effect at the next step; closing exceeds the launcher's poll time."""
    time.sleep(0.5)
    with StopRequest() as stop:
        for _ in range(36_000):
            if stop.is_set():
                break
            time.sleep(0.1)
        else:
            return EXIT_OK
    time.sleep(2.0 * rank)
    return EXIT_PREEMPTED


def _train_together(fault: str, rank: int, folder: Path) -> int:
    """Steps with a collective on every rank, under the heartbeat and the watchdog of a run. A fault hits rank 1."""
    import torch
    import torch.distributed as torch_dist

    from arc_ds.errors import OutOfMemoryError
    from arc_ds.launch.heartbeat import beating
    from arc_ds.system import activity, dist
    from arc_ds.training.watchdog import Watchdog

    faults = {
        "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "frozen": lambda: os.kill(os.getpid(), signal.SIGSTOP),
        "raises": lambda: {}["no such key"],
        "memory": lambda: _raise(OutOfMemoryError("rank 1 needs more memory")),
        "stalled": lambda: time.sleep(600),
        "stuck": lambda: time.sleep(600),
    }
    dist.setup_logging()
    torch_dist.init_process_group("gloo")
    limits = {"limit_s": 5.0 if fault == "stalled" else 600.0, "stop_grace_s": 2.0}
    with (
        beating(TIMEOUT_S) as heart,
        StopRequest() as stop,
        Watchdog(folder, rank=rank, heartbeat=heart, stop=stop, **limits) as watchdog,
    ):
        for step in range(1, 400):
            activity.note("encoder layer 7", step=step)
            if step == 4 and rank == 1:
                activity.note("decoder small")
                time.sleep(2.5)  # a beat reports it
                (folder / "fault").touch()
                faults[fault]()
            torch_dist.all_reduce(torch.ones(8))
            watchdog.alive()
            time.sleep(0.05)
    return EXIT_OK


def _raise(error: Exception) -> None:
    raise error

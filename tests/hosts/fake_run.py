"""A replacement of `arc_ds.train` for tests of launchers: `main([FOLDER, FAILING_RANK, CODE])` runs on every rank.

Each rank writes its environment, arguments and folder to FOLDER. The failing rank returns CODE after that. The others
run for up to a minute, like a step that waits for the failing one, and note in FOLDER that they were asked to stop.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

from arc_ds.launch.exit_codes import EXIT_FAILED, EXIT_PREEMPTED
from arc_ds.launch.signals import StopRequest
from arc_ds.system.files import write_whole


def main(arguments: list[str]) -> int:
    """Report, then fail or wait for a stop."""
    folder, failing_rank, code = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    rank = int(os.environ["RANK"])
    with StopRequest() as stop:
        report = {
            "environment": dict(os.environ),
            "arguments": arguments,
            "folder": os.getcwd(),
            "host": socket.gethostname(),
            "stdin": sys.stdin.read(),
        }
        write_whole(folder / f"rank_{rank}.json", json.dumps(report))
        while rank == failing_rank and len(list(folder.glob("rank_*.json"))) < int(os.environ["WORLD_SIZE"]):
            time.sleep(0.05)
        if rank == failing_rank:
            return code
        for _ in range(600):
            if stop.is_set():
                print(f"rank {rank} saves", flush=True)
                (folder / f"saved_{rank}").touch()
                return EXIT_PREEMPTED
            time.sleep(0.1)
    return EXIT_FAILED

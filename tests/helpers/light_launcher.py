"""A replacement of DeepSpeed's launcher for tests of `arc_ds.launch.wrapper`. Imports nothing and exits with 0."""

from __future__ import annotations

import os
import subprocess
import sys

if __name__ == "__main__":
    world_size, *command = sys.argv[1:]
    place = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    ranks = [
        subprocess.Popen([sys.executable, *command], env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank})
        for rank in map(str, range(int(world_size)))
    ]
    for process in ranks:
        process.wait()

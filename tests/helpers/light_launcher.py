"""A replacement of DeepSpeed's launcher for tests of `arc_ds.launch.wrapper`. Imports little and exits with 0."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

if __name__ == "__main__":
    world_size, *command = sys.argv[1:]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen([sys.executable, *command], env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank})
        for rank in map(str, range(int(world_size)))
    ]
    for process in ranks:
        process.wait()

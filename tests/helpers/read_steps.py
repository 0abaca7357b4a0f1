"""A process that reads steps of a `TinyMixture` and writes the digest of each batch. Tests kill it.

python -m tests.helpers.read_steps FOLDER OUT FIRST END HANG_AT WORKERS RANK WORLD_SIZE
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from arc_ds.data.loading.workers import BatchLoader
from tests.helpers.batches import digest
from tests.helpers.tiny_mixture import TinyMixture


def main() -> None:
    """Write one line per step and sync it to disk before requesting the next batch. Step HANG_AT waits to be killed."""
    first, end, hang_at, num_workers, rank, world_size = map(int, sys.argv[3:])
    data = TinyMixture(Path(sys.argv[1])).data(rank, world_size)
    loader = BatchLoader(data, range(first, end), num_workers=num_workers)
    with Path(sys.argv[2]).open("w") as out, loader as batches:
        for batch in batches:
            out.write(digest(batch) + "\n")
            out.flush()
            if batch.step == hang_at:
                time.sleep(3600)


if __name__ == "__main__":
    main()

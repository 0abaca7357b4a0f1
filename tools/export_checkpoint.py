#!/usr/bin/env python3
"""Export a run's ZeRO shards as safetensors, like `arc-ds export`. Needs no GPU or process group.

python tools/export_checkpoint.py RUN_OR_CHECKPOINT OUT [--format arc]
"""

from __future__ import annotations

import argparse
import sys

from arc_ds.commands.export import add_arguments, run
from arc_ds.errors import ArcError


def main() -> int:
    """Parse the command line and export; return 0 on success, 2 if the input cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    try:
        return run(parser.parse_args())
    except ArcError as error:
        print(f"export_checkpoint: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

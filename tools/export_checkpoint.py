#!/usr/bin/env python3
"""Export a run's ZeRO shards as safetensors, like `arc-ds export`. Needs no GPU or process group.

python tools/export_checkpoint.py RUN_OR_CHECKPOINT OUT [--format arc]
"""

from __future__ import annotations

import sys

from arc_ds.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))

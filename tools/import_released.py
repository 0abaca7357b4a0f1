#!/usr/bin/env python3
"""Turn a downloaded public ARC-Encoder into the ARC exchange format, like `arc-ds import`. Needs no GPU.

python tools/import_released.py FOLDER OUT [--encoder-backbone FOLDER]
"""

from __future__ import annotations

import sys

from arc_ds.cli import main

if __name__ == "__main__":
    sys.exit(main(["import", *sys.argv[1:]]))

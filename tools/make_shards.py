"""Build shards from text files or JSONL: `arc-ds shards build` for those who run the tools by path."""

from __future__ import annotations

import sys

from arc_ds.cli import main

if __name__ == "__main__":
    sys.exit(main(["shards", "build", *sys.argv[1:]]))

"""`arc-ds shards stats`."""

from __future__ import annotations

import argparse
from pathlib import Path

from arc_ds.commands.shards.length_stats import describe, draw_lengths
from arc_ds.shards.reader import ShardSet


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand `stats`."""
    parser = commands.add_parser(
        "stats",
        help="print lengths of records, tokens of sources, and counts of cut and left-out documents",
        description="Reads manifests and indexes only.",
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument(
        "--sources", type=int, default=20, help="number of largest sources to list (default: %(default)s)"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="plot the record lengths of all folders to this file")
    parser.set_defaults(run=_stats)


def _stats(namespace: argparse.Namespace) -> int:
    lengths = {}
    for folder in namespace.folders:
        shards = ShardSet(folder)
        lengths[folder] = shards.num_tokens
        print(describe(folder, shards.manifest, shards.num_tokens, max_sources=max(namespace.sources, 0)))
    if namespace.png is not None:
        draw_lengths(namespace.png, lengths)
        print(f"plot: {namespace.png}")
    return 0

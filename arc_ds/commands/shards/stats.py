"""`arc-ds shards stats`."""

from __future__ import annotations

import argparse

from arc_ds.commands.shards.length_stats import describe, draw_lengths
from arc_ds.shards.reader import ShardSet
from arc_ds.system.user_paths import path_argument, user_path

HELP = "print lengths of records, tokens of sources, and counts of cut and left-out documents"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommand."""
    parser.description = "Reads manifests and indexes only."
    parser.add_argument("folders", type=user_path, nargs="+", metavar="FOLDER")
    parser.add_argument(
        "--sources", type=int, default=20, help="number of largest sources to list (default: %(default)s)"
    )
    parser.add_argument(
        "--png", type=path_argument, metavar="FILE", help="plot the record lengths of all folders to this file"
    )


def run(namespace: argparse.Namespace) -> int:
    """Run the subcommand; return its exit code."""
    lengths = {}
    for folder in namespace.folders:
        shards = ShardSet(folder)
        lengths[folder] = shards.num_tokens
        print(describe(folder, shards.manifest, shards.num_tokens, max_sources=max(namespace.sources, 0)))
    if namespace.png is not None:
        draw_lengths(namespace.png, lengths)
        print(f"plot: {namespace.png}")
    return 0

"""`arc-ds shards check`."""

from __future__ import annotations

import argparse
from pathlib import Path

from arc_ds.data.shard_reader import check_shards


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand `check`."""
    parser = commands.add_parser("check", help="read everything in folders of shards and name every fault")
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.set_defaults(run=_check)


def _check(namespace: argparse.Namespace) -> int:
    faults = {folder: check_shards(folder) for folder in namespace.folders}
    for folder, found in faults.items():
        for fault in found:
            print(f"{Path(folder) / str(fault)}")
        print(f"{folder}: {f'{len(found)} faults' if found else 'all records whole'}")
    return 1 if any(faults.values()) else 0

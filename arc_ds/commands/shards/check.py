"""`arc-ds shards check`."""

from __future__ import annotations

import argparse
import sys

from arc_ds.shards.check import check_shards
from arc_ds.shards.storage.cache import open_cache
from arc_ds.system.processes import num_cores
from arc_ds.system.urls import is_url
from arc_ds.system.user_paths import user_path

HELP = "read folders of shards completely and report every fault"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommand."""
    parser.add_argument("folders", type=user_path, nargs="+", metavar="FOLDER")
    parser.add_argument("--workers", type=int, default=num_cores(), help="processes (default: the cores, %(default)s)")


def run(namespace: argparse.Namespace) -> int:
    """Run the subcommand; return its exit code."""
    num_faults = 0
    for folder in namespace.folders:
        found = 0
        for fault in check_shards(folder, workers=namespace.workers, progress=sys.stderr.isatty()):
            print(f"{folder.rstrip('/')}/{fault}")
            found += 1
        where = f" (as kept in the cache {open_cache().folder})" if is_url(folder) else ""
        verdict = f"{found} faults. Copy the damaged files again or rebuild them" if found else "all records whole"
        print(f"{folder}: {verdict}{where}")
        num_faults += found
    return 1 if num_faults else 0

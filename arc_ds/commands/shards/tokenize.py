"""`arc-ds shards tokenize`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from arc_ds.commands.shards.engine import Workers, add_engine, chosen_workers
from arc_ds.shards.token_cache.writer import build_token_caches
from arc_ds.system.user_paths import user_path

HELP = "store the token ids of shards next to them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommand."""
    parser.description = (
        "Tokenises every text of the shards once and stores the ids, so that training only reads them. A "
        "killed call resumes after its finished shards. Shards that are rebuilt need a new cache."
    )
    parser.add_argument(
        "folder",
        type=user_path,
        metavar="FOLDER",
        help="folder of shards, or its URL (the ids of a URL are kept on this host)",
    )
    parser.add_argument(
        "--tokenizer",
        type=user_path,
        required=True,
        nargs="+",
        metavar="TOKENIZER",
        help="tokenizers of the run's encoder and decoders",
    )
    add_engine(parser)


def run(namespace: argparse.Namespace) -> int:
    """Run the subcommand; return its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with chosen_workers(namespace) as workers:
        cache_and_print(namespace.folder, namespace.tokenizer, workers)
    return 0


def cache_and_print(folder: str, tokenizers: Sequence[str], workers: Workers) -> None:
    """Build the token caches of a folder of shards, and print a line for each. A terminal shows a progress bar."""
    for made in build_token_caches(folder, tokenizers, **workers._asdict(), progress=sys.stderr.isatty()):
        left_out = f", {made.left_out} texts left out" if made.left_out else ""
        print(f"{made.folder}: {made.ids} ids of {made.records} records{left_out}")

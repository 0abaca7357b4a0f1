"""`arc-ds shards show`."""

from __future__ import annotations

import argparse
import sys

from arc_ds.data.shard_reader import ShardSet
from arc_ds.data.shard_show import render
from arc_ds.data.tasks import TaskLimits, make_example
from arc_ds.data.tokenizers import load_tokenizer


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand `show`."""
    parser = commands.add_parser("show", help="print samples: contexts coloured, targets underlined")
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--tokenizer", required=True, help="the encoder's tokenizer: a file or folder")
    parser.add_argument("--decoder-tokenizer", help="the decoder's (default: the encoder's)")
    parser.add_argument("--task", choices=("reconstruction", "continuation"), default="continuation")
    parser.add_argument("--first", type=int, default=0, help="first record (default: %(default)s)")
    parser.add_argument("--num", type=int, default=3, help="records to show (default: %(default)s)")
    parser.add_argument("--max-context", type=int, default=256, help="encoder tokens (default: %(default)s)")
    parser.add_argument("--max-prefix", type=int, default=256, help="decoder tokens (default: %(default)s)")
    parser.add_argument("--max-continuation", type=int, default=256, help="decoder tokens (default: %(default)s)")
    parser.set_defaults(run=_show)


def _show(namespace: argparse.Namespace) -> int:
    source = ShardSet(namespace.folder)
    encoder = load_tokenizer(namespace.tokenizer)
    decoder = load_tokenizer(namespace.decoder_tokenizer) if namespace.decoder_tokenizer else encoder
    limits = TaskLimits(
        max_context=namespace.max_context,
        max_prefix=namespace.max_prefix,
        max_continuation=namespace.max_continuation,
    )
    colour = sys.stdout.isatty()
    for idx in range(namespace.first, min(namespace.first + namespace.num, len(source))):
        records = [source.record(idx)]
        example = make_example(records, task=namespace.task, seed=idx, encoder=encoder, decoder=decoder, limits=limits)
        print(render(example, encoder, decoder, title=f"record {idx}", colour=colour))
    return 0

"""`arc-ds shards build`."""

from __future__ import annotations

import argparse
import logging
import sys

from arc_ds.data.shard_writer import build_shards


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand `build`."""
    parser = commands.add_parser("build", help="turn text files and JSONL into shards")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help=".txt or .jsonl files, also .gz, or folders of them")
    parser.add_argument("--out", required=True, help="folder to create")
    parser.add_argument("--tokenizer", required=True, help="the encoder's tokenizer: a file or folder")
    parser.add_argument("--max-tokens", type=int, default=768, help="longest record (default: %(default)s)")
    parser.add_argument("--min-tokens", type=int, default=16, help="shortest record (default: %(default)s)")
    parser.add_argument("--shard-mib", type=float, default=128, help="size of a shard (default: %(default)s MiB)")
    parser.add_argument("--text-field", default="text", help="field of the JSONL records (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    parser.set_defaults(run=_build)


def _build(namespace: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    manifest = build_shards(
        namespace.inputs,
        namespace.out,
        namespace.tokenizer,
        max_tokens=namespace.max_tokens,
        min_tokens=namespace.min_tokens,
        shard_bytes=int(namespace.shard_mib * (1 << 20)),
        text_field=namespace.text_field,
        overwrite=namespace.overwrite,
        progress=sys.stderr.isatty(),
    )
    documents = sum(source.documents for source in manifest.sources)
    left_out = sum(manifest.skipped.values())
    print(
        f"{namespace.out}: {manifest.samples} records of {documents} documents ({left_out} left out), "
        f"{manifest.tokens} tokens, {len(manifest.shards)} shards, {sum(s.bytes for s in manifest.shards)} bytes"
    )
    return 0

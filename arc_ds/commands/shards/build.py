"""`arc-ds shards build`."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys

from arc_ds.commands.shards.engine import Workers, add_engine, chosen_workers
from arc_ds.commands.shards.tokenize import cache_and_print
from arc_ds.shards.building.record_maker import REASONS
from arc_ds.shards.building.writer import build_shards
from arc_ds.shards.format import Manifest
from arc_ds.system.user_paths import user_path
from arc_ds.tokenizers import load_tokenizer

logger = logging.getLogger(__name__)


HELP = "turn text, JSONL, Parquet or Arrow files into shards"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommand."""
    parser.description = (
        "Cuts documents into records and writes them as shards. Repeat the same command to resume a killed "
        "build. The result is identical, byte for byte, for any number of --workers and for every --engine."
    )
    parser.add_argument(
        "inputs",
        type=user_path,
        nargs="+",
        metavar="INPUT",
        help=".txt, JSONL as .jsonl, .json or .ndjson (all also .gz, .zst), .parquet, .arrow, or folders of them",
    )
    parser.add_argument("--out", type=user_path, required=True, help="folder to create")
    parser.add_argument("--tokenizer", type=user_path, required=True, help="the encoder's tokenizer: a file or folder")
    _add_rules(parser)
    parser.add_argument("--shard-mib", type=float, default=128, help="size of a shard (default: %(default)s MiB)")
    add_engine(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    parser.add_argument(
        "--cache-tokens",
        type=user_path,
        nargs="+",
        default=[],
        metavar="TOKENIZER",
        help="also store the token ids of all texts by these tokenizers next to the shards (or later: shards tokenize)",
    )


def _add_rules(parser: argparse.ArgumentParser) -> None:
    """Add the options that control how documents are cut, filtered and rejected."""
    rules = parser.add_argument_group("rules for documents")
    rules.add_argument(
        "--kind",
        choices=("pretraining", "fine_tuning"),
        default="pretraining",
        help="pretraining: a text, cut into records (default); fine_tuning: passages, question and answer, never cut",
    )
    rules.add_argument(
        "--text-field", default="text", help="field with the text; a.b: field b of the object a (default: %(default)s)"
    )
    rules.add_argument("--max-tokens", type=int, default=768, help="maximum length of a record (default: %(default)s)")
    rules.add_argument("--min-tokens", type=int, default=16, help="minimum length of a record (default: %(default)s)")
    rules.add_argument("--min-chars", type=int, default=0, help="leave out shorter documents (default: %(default)s)")
    rules.add_argument("--quality-field", metavar="NAME", help="field with the quality score of a document")
    rules.add_argument("--min-quality", type=float, metavar="X", help="leave out documents with a lower score")
    rules.add_argument(
        "--max-document-mib", type=float, default=64, help="a larger document is a fault (default: %(default)s MiB)"
    )
    rules.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="on a faulty document: stop the build (default), or leave the document out, count it and log it",
    )


def run(namespace: argparse.Namespace) -> int:
    """Run the subcommand; return its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for path in namespace.cache_tokens:
        load_tokenizer(path)  # fails now, not after hours of building, if a tokenizer cannot be read
    with chosen_workers(namespace) as workers:
        _build(namespace, workers)
    return 0


def _build(namespace: argparse.Namespace, workers: Workers) -> None:
    rules = ("kind", "text_field", "max_tokens", "min_tokens", "min_chars", "quality_field", "min_quality", "on_error")
    manifest = build_shards(
        namespace.inputs,
        namespace.out,
        namespace.tokenizer,
        **{name: getattr(namespace, name) for name in rules},
        max_document_bytes=int(namespace.max_document_mib * (1 << 20)),
        shard_bytes=int(namespace.shard_mib * (1 << 20)),
        **workers._asdict(),
        overwrite=namespace.overwrite,
        progress=sys.stderr.isatty(),
    )
    print(f"{namespace.out}: {summary(manifest)}")
    try:
        if namespace.cache_tokens:
            cache_and_print(namespace.out, namespace.cache_tokens, workers)
    except BaseException:
        go_on = shlex.join(["arc-ds", "shards", "tokenize", namespace.out, "--tokenizer", *namespace.cache_tokens])
        logger.warning("The shards are complete, but their token caches are not. To resume: %s", go_on)
        raise


def summary(manifest: Manifest) -> str:
    """The size of a build, and the number of documents left out for each reason, as text."""
    documents = sum(source.documents for source in manifest.sources)
    cut = sum(source.cut for source in manifest.sources)
    lines = [
        f"{manifest.samples} records of {documents} documents ({cut} cut), {manifest.tokens} tokens, "
        f"{len(manifest.shards)} shards, {sum(shard.bytes for shard in manifest.shards)} bytes"
    ]
    lines += [f"  left out: {count} {REASONS.get(reason, reason)}" for reason, count in manifest.skipped.items()]
    return "\n".join(lines)

"""`arc-ds shards index`."""

from __future__ import annotations

import argparse
import logging
import sys

from arc_ds.shards.index import index_shards
from arc_ds.shards.tar_index import RecordForm
from arc_ds.system.processes import num_cores
from arc_ds.system.user_paths import user_path

REASONS = {
    "bad_record": "that lack the fields of a record",
    "empty": "empty",
    "no_file": "links or sparse files",
    "no_record": "samples without such a member",
    "not_gzip": "damaged gzip",
    "not_json": "not a JSON object",
    "not_utf8": "not UTF-8",
    "repeated": "of a key that already had one",
    "too_large": "too large",
}


HELP = "make existing webdataset tars usable without changing them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommand."""
    parser.description = (
        "Writes an index for each tar, and a manifest. Texts are not cut: training uses only a part of a "
        "record that is longer than a training sequence. To cut texts, extract them and use `build`."
    )
    parser.add_argument(
        "tars",
        type=user_path,
        nargs="+",
        metavar="TARS",
        help="a folder of tars, or paths and URLs of tars; {000..127} expands to a range",
    )
    parser.add_argument("--tokenizer", type=user_path, required=True, help="the encoder's tokenizer: a file or folder")
    parser.add_argument("--out", type=user_path, help="folder for indexes and manifest (default: next to the tars)")
    parser.add_argument(
        "--member",
        default="json",
        help="suffix of the members that hold records, such as json or json.gz (objects), txt or txt.gz (plain text) "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--text-field", default="text", help="field with the text; a.b: field b of the object a (default: %(default)s)"
    )
    parser.add_argument(
        "--kind",
        choices=("pretraining", "fine_tuning"),
        default="pretraining",
        help="pretraining: records with a text (default); fine_tuning: records with passages, question and answer",
    )
    parser.add_argument("--workers", type=int, default=num_cores(), help="processes (default: the cores, %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing manifest")


def run(namespace: argparse.Namespace) -> int:
    """Run the subcommand; return its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    manifest = index_shards(
        namespace.tars,
        namespace.tokenizer,
        out_dir=namespace.out,
        form=RecordForm(
            member=namespace.member.lstrip(".").lower(), text_field=namespace.text_field, kind=namespace.kind
        ),
        workers=namespace.workers,
        overwrite=namespace.overwrite,
        progress=sys.stderr.isatty(),
    )
    print(
        f"{manifest.samples} records in {len(manifest.shards)} tars, {manifest.tokens} tokens, "
        f"{manifest.min_tokens} to {manifest.max_tokens} a record"
    )
    for reason, count in manifest.skipped.items():
        print(f"  left out: {count} {REASONS.get(reason, reason)}")
    return 0

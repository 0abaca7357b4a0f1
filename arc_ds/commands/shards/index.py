"""`arc-ds shards index`."""

from __future__ import annotations

import argparse
import logging
import sys

from arc_ds.shards.index import index_shards
from arc_ds.shards.tar_index import RecordForm
from arc_ds.system.processes import num_cores

REASONS = {
    "bad_record": "without the fields of a record",
    "empty": "empty",
    "no_file": "links or sparse files",
    "no_record": "samples without such a member",
    "not_gzip": "damaged gzip",
    "not_json": "no JSON object",
    "not_utf8": "not UTF-8",
    "repeated": "of a key that had one already",
    "too_large": "too large",
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand `index`."""
    parser = commands.add_parser(
        "index",
        help="make webdataset tars that others wrote usable as they are",
        description="Writes an index for each tar, and a manifest. Texts are not cut: of a record longer than a "
        "training sequence a part is used. To cut them, extract them and use `build`.",
    )
    parser.add_argument(
        "tars", nargs="+", metavar="TARS", help="a folder of tars, or tars and their URLs; {000..127} stands for many"
    )
    parser.add_argument("--tokenizer", required=True, help="the encoder's tokenizer: a file or folder")
    parser.add_argument("--out", help="folder for indexes and manifest (default: beside the tars)")
    parser.add_argument(
        "--member",
        default="json",
        help="what the names of members with records end with: json or json.gz (objects), txt or txt.gz (plain text) "
        "and the like (default: %(default)s)",
    )
    parser.add_argument("--text-field", default="text", help="field with the text (default: %(default)s)")
    parser.add_argument(
        "--kind",
        choices=("pretraining", "fine_tuning"),
        default="pretraining",
        help="records with a text (default), or with passages, question and answer",
    )
    parser.add_argument("--workers", type=int, default=num_cores(), help="processes (default: the cores, %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a manifest that is there")
    parser.set_defaults(run=_index)


def _index(namespace: argparse.Namespace) -> int:
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

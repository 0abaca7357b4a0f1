"""`arc-ds shards build | check | show`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from arc_ds.data.segments import Segment
from arc_ds.data.shard_reader import ShardSet, check_shards
from arc_ds.data.shard_writer import build_shards
from arc_ds.data.tasks import Example, TaskLimits, make_example
from arc_ds.data.tokenizers import Tokenizer, load_tokenizer

_CONTEXT, _TARGET, _DIM, _END = "\x1b[36m", "\x1b[4m", "\x1b[2m", "\x1b[0m"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `shards`; each subcommand sets `run=function(namespace) -> exit code`."""
    parser = subparsers.add_parser("shards", help="build, check or show webdataset shards")
    commands = parser.add_subparsers(dest="shards_command", required=True)
    build = commands.add_parser("build", help="turn text files and JSONL into shards")
    build.add_argument("inputs", nargs="+", metavar="INPUT", help=".txt or .jsonl files, also .gz, or folders of them")
    build.add_argument("--out", required=True, help="folder to create")
    build.add_argument("--tokenizer", required=True, help="the encoder's tokenizer: a file or folder")
    build.add_argument("--max-tokens", type=int, default=768, help="longest record (default: %(default)s)")
    build.add_argument("--min-tokens", type=int, default=16, help="shortest record (default: %(default)s)")
    build.add_argument("--shard-mib", type=float, default=128, help="size of a shard (default: %(default)s MiB)")
    build.add_argument("--text-field", default="text", help="field of the JSONL records (default: %(default)s)")
    build.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    build.set_defaults(run=_build)
    check = commands.add_parser("check", help="read everything in folders of shards and name every fault")
    check.add_argument("folders", nargs="+", metavar="FOLDER")
    check.set_defaults(run=_check)
    show = commands.add_parser("show", help="print samples: contexts coloured, targets underlined")
    show.add_argument("folder", metavar="FOLDER")
    show.add_argument("--tokenizer", required=True, help="the encoder's tokenizer: a file or folder")
    show.add_argument("--decoder-tokenizer", help="the decoder's (default: the encoder's)")
    show.add_argument("--task", choices=("reconstruction", "continuation"), default="continuation")
    show.add_argument("--first", type=int, default=0, help="first record (default: %(default)s)")
    show.add_argument("--num", type=int, default=3, help="records to show (default: %(default)s)")
    show.add_argument("--max-context", type=int, default=256, help="encoder tokens (default: %(default)s)")
    show.add_argument("--max-prefix", type=int, default=256, help="decoder tokens (default: %(default)s)")
    show.add_argument("--max-continuation", type=int, default=256, help="decoder tokens (default: %(default)s)")
    show.set_defaults(run=_show)


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
    print(
        f"{namespace.out}: {manifest.samples} records of {documents} documents ({manifest.skipped} too short), "
        f"{manifest.tokens} tokens, {len(manifest.shards)} shards, {sum(s.bytes for s in manifest.shards)} bytes"
    )
    return 0


def _check(namespace: argparse.Namespace) -> int:
    faults = {folder: check_shards(folder) for folder in namespace.folders}
    for folder, found in faults.items():
        for fault in found:
            print(f"{Path(folder) / str(fault)}")
        print(f"{folder}: {f'{len(found)} faults' if found else 'all records whole'}")
    return 1 if any(faults.values()) else 0


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
        text = source.record(idx)["text"]
        example = make_example(text, task=namespace.task, seed=idx, encoder=encoder, decoder=decoder, limits=limits)
        print(render(example, encoder, decoder, title=f"record {idx}", colour=colour))
    return 0


def render(example: Example, encoder: Tokenizer, decoder: Tokenizer, *, title: str, colour: bool) -> str:
    """A sample as a person reads it: the context coloured (⟦…⟧ without colour), the targets underlined (__…__)."""
    sample = example.sample
    lengths = f"{sample.num_context_tokens} encoder tokens, {sample.num_text_tokens} decoder tokens"
    head = f"── {title}: {sample.task}{' (too short to continue)' if example.degraded else ''}, {lengths} ──"
    pieces = [_piece(piece, encoder, decoder, colour) for piece in _joined(sample.segments)]
    return "\n".join([f"{_DIM}{head}{_END}" if colour else head, "".join(pieces), ""])


def _joined(segments: Sequence[Segment]) -> list[Segment]:
    """The segments, a target's input-only first token joined to it, so that it decodes with what follows."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if segment.in_loss and last is not None and last.kind == "text":
            joined[-1] = Segment.text((*last.ids, *segment.ids), in_loss=True)
        else:
            joined.append(segment)
    return joined


def _piece(segment: Segment, encoder: Tokenizer, decoder: Tokenizer, colour: bool) -> str:
    text = (encoder if segment.kind == "context" else decoder).decode(list(segment.ids))
    if segment.kind == "context":
        marker = f"<{segment.marker}>" if segment.marker else ""
        return f"{_CONTEXT}{text}{marker}{_END}" if colour else f"⟦{text}{marker}⟧"
    if segment.in_loss:
        return f"{_TARGET}{text}{_END}" if colour else f"__{text}__"
    return text

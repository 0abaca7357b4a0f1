"""`arc-ds export`: converts a run's checkpoint to weights that other programs can load."""

from __future__ import annotations

import argparse

from arc_ds.export.consolidate import consolidate_newest
from arc_ds.export.formats import DTYPES, check_target, write_export
from arc_ds.system.user_paths import path_argument


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `arc-ds export`."""
    parser = subparsers.add_parser(
        "export",
        description="Joins the ZeRO shards of a checkpoint and writes safetensors. Needs no GPU or process group.",
    )
    parser.add_argument(
        "source", type=path_argument, help="a run's folder (uses its newest checkpoint) or a step_NNNNNN folder"
    )
    parser.add_argument("out", type=path_argument, help="folder to write; must not exist")
    parser.add_argument(
        "--format",
        choices=("arc-ds", "arc"),
        default="arc-ds",
        help="arc-ds: one self-describing folder (default); arc: the reference's format (params.json ...)",
    )
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="dtype of the tensors")
    parser.add_argument(
        "--tokenizer", type=path_argument, help="the encoder's tokenizer, if it has moved since the run"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing export")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; return 0 on success."""
    check_target(args.out, overwrite=args.overwrite)  # check first: joining the shards may take minutes
    checkpoint, trained = consolidate_newest(args.source)
    write_export(
        trained,
        args.out,
        export_format=args.format,
        dtype=args.dtype,
        overwrite=args.overwrite,
        tokenizer=args.tokenizer,
    )
    parameters = sum(t.numel() for t in trained.tensors.values())
    print(f"{checkpoint} -> {args.out}: step {trained.step}, {parameters / 1e6:.1f} M parameters, format {args.format}")
    return 0

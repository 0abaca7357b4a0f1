"""`arc-ds export`: converts a run's checkpoint to weights that other programs can load."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

from arc_ds.errors import ConfigError
from arc_ds.export.consolidate import consolidate_newest, find_checkpoint
from arc_ds.export.formats import DTYPES, FORMATS, check_target, write_export
from arc_ds.inference.checksums import verify_export
from arc_ds.inference.generate import whole_number
from arc_ds.inference.load import check_compressor, open_arc_folder
from arc_ds.system.packages import require
from arc_ds.system.user_paths import path_argument
from arc_ds.tracking.registration import find_mlflow_run, register_export

_DTYPE_NAMES = {"bf16": "bfloat16", "fp32": "float32"}
_MAX_AVERAGE = 1000


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `arc-ds export`."""
    parser = subparsers.add_parser(
        "export",
        description="Joins the shards of a checkpoint and writes safetensors. Needs no GPU, no process group and "
        "no DeepSpeed, and little memory. Every written tensor is read again and compared.",
    )
    parser.add_argument(
        "source",
        type=path_argument,
        help="a run's folder (uses its newest checkpoint) or a step_NNNNNN folder; with --verify, an export",
    )
    parser.add_argument("out", type=path_argument, nargs="?", help="folder to write; must not exist")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="arc-ds",
        help="arc-ds: one self-describing folder (default); arc: the reference's format (params.json ...); both: the "
        "files of both in one folder",
    )
    parser.add_argument(
        "--dtype",
        type=lambda name: _DTYPE_NAMES.get(name, name),
        choices=tuple(DTYPES),
        default="float32",
        help="dtype of the tensors; also bf16, fp32",
    )
    parser.add_argument(
        "--decoder",
        action="append",
        default=[],
        metavar="NAME",
        help="write the bridge and markers of this decoder only; several times for several, which keep the run's order "
        "(default: all)",
    )
    parser.add_argument("--average", type=int, default=1, metavar="K", help="write the mean of the last K checkpoints")
    parser.add_argument(
        "--tokenizer", type=path_argument, help="the encoder's tokenizer, if it has moved since the run"
    )
    parser.add_argument(
        "--encoder",
        type=path_argument,
        metavar="FOLDER",
        help="the weights that the run started from (its encoder.init_from or encoder.backbone), if they have moved; "
        "needed only if a part of the encoder was frozen",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing export")
    parser.add_argument(
        "--register",
        metavar="NAME",
        help="also log the export in the run's MLflow run and register it under this name, as a model that compresses "
        "texts",
    )
    parser.add_argument("--verify", action="store_true", help="only compare the files of an export with its checksums")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; return 0 on success."""
    if args.verify:
        return _verify(args)
    if args.out is None:
        raise ConfigError("no folder to write: give one after the run, or add --verify to check an export")
    source = Path(os.path.abspath(args.source))  # its run is the folder two levels above
    average = whole_number("--average", args.average, at_least=1, at_most=_MAX_AVERAGE)
    # Check first: verifying the shards may take minutes.
    check_target(args.out, overwrite=args.overwrite)
    if args.register is not None:
        require("mlflow")
        find_mlflow_run(find_checkpoint(source).parent.parent, None)

    write = partial(
        write_export,
        out=args.out,
        export_format=args.format,
        dtype=args.dtype,
        overwrite=args.overwrite,
        tokenizer=args.tokenizer,
    )
    checkpoint, trained = consolidate_newest(source, average, write, args.decoder, args.encoder)
    parameters = sum(t.numel() for t in trained.tensors.values())
    mean = f" (mean of steps {', '.join(map(str, trained.averaged_steps))})" if trained.averaged_steps else ""
    print(
        f"{checkpoint} -> {args.out}: step {trained.step}{mean}, {parameters / 1e6:.1f} M parameters, "
        f"format {args.format}, for {', '.join(decoder.name for decoder in trained.decoders)}"
    )
    if args.register is not None:
        config = None if trained.record is None else trained.record.config
        number = register_export(
            args.out,
            args.register,
            run=checkpoint.parent.parent,
            configured=None if config is None else config.tracking.uri,
            step=trained.step,
        )
        print(f"registered as version {number} of {args.register}: models:/{args.register}/{number}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    if args.out is not None:
        raise ConfigError(f"--verify checks one export, but two folders were given: leave out {args.out}")
    files = verify_export(args.source)
    folder = open_arc_folder(args.source)
    check_compressor(folder.spec, folder.tensors)
    size = sum(entry.size for entry in files)
    print(f"{args.source}: {len(files)} files, {size / 1e6:.1f} MB, all as they were written")
    return 0

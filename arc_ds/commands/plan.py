"""`arc-ds plan`: memory, time and cost of a run, before the GPUs are paid for."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from arc_ds.config.load import load_config
from arc_ds.config.schema import RunConfig
from arc_ds.errors import ConfigError, DataError, StorageError
from arc_ds.planning.batches import sample_kinds
from arc_ds.planning.hardware import GPUS, LINKS, check_machine
from arc_ds.planning.plan import RunModel, make_plan
from arc_ds.planning.published import with_published_sizes
from arc_ds.planning.report import Report, to_json, to_text
from arc_ds.planning.search import nearest_fit, sweep
from arc_ds.planning.sizes import check_tasks
from arc_ds.shards.reader import ShardSet
from arc_ds.system.urls import is_url
from arc_ds.system.user_paths import path_argument
from arc_ds.training.engine import REPLICATED_SHARE, choose_placement
from arc_ds.training.optim import make_param_groups
from arc_ds.training.outline import build_compressor_outline, build_decoder_outline, read_outline

EXIT_FITS, EXIT_DOES_NOT_FIT = 0, 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `arc-ds plan`."""
    parser = subparsers.add_parser(
        "plan",
        description="Calculates memory, communication, time, cost and disk of a run, tells whether it fits, finds a "
        "config that fits, and shows how it scales. No GPU, network, weights or shards are needed: published sizes of "
        "models and the config's own sizes stand in for missing files. The exit code is 0 if the run fits, and 1 if it "
        "does not.",
    )
    parser.add_argument(
        "config", type=path_argument, help="YAML file of the run; unset variables in it become placeholders"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, as for arc-ds train")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs of all hosts (default 8)")
    parser.add_argument("--hosts", type=int, metavar="N", help="hosts (default: as few as hold 8 GPUs each)")
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h100-80", help="kind of the GPUs (default h100-80)")
    parser.add_argument(
        "--interconnect", choices=tuple(LINKS), default="8x400g", help="network of each host (default 8x400g)"
    )
    parser.add_argument("--price", type=float, metavar="P", help="price of an hour of one GPU, for the cost")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    machine = check_machine(args.gpu, args.gpus, args.hosts, args.interconnect)
    if args.price is not None and not 0 <= args.price < float("inf"):
        raise ConfigError(f"--price is {args.price}; expected the price of an hour of one GPU, such as 2.5.")
    with tempfile.TemporaryDirectory(prefix="arc_ds_plan_") as folder:
        config = load_for_plan(args.config, args.overrides)
        check_tasks(config)
        sized, notes = with_published_sizes(config, Path(folder))
        model = read_model(sized)

    def reload(overrides: Sequence[str]) -> RunConfig:
        return load_for_plan(args.config, (*args.overrides, *overrides))

    plan = make_plan(config, model, machine)
    report = Report(
        plan=plan,
        fit=None if plan.fits else nearest_fit(config, model, machine, reload),
        rows=sweep(config, model, machine, reload),
        price=args.price,
        notes=(*notes, *model.kinds.origins),
    )
    print(json.dumps(to_json(report), indent=2) if args.json else to_text(report))
    return EXIT_FITS if plan.fits else EXIT_DOES_NOT_FIT


def read_model(config: RunConfig) -> RunModel:
    """The model of a run, from the sizes of its backbones and the lengths of its records.

    Raises WeightsError or ConfigError like `read_outline`.
    """
    spec, decoders = read_outline(config)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return RunModel(
        spec=spec,
        decoders=decoders,
        kinds=sample_kinds(config, spec.packing, _open_shards),
        build_compressor=lambda changed: build_compressor_outline(changed, spec, dtype),
        build_decoder=lambda changed, idx: build_decoder_outline(changed, decoders[idx], idx, dtype),
        count_groups=lambda changed, compressor: len(make_param_groups(compressor, changed.optimizer)),
        choose_placement=choose_placement,
        replicated_share=REPLICATED_SHARE,
    )


def load_for_plan(path: str | Path, overrides: Sequence[str]) -> RunConfig:
    """`load_config`, in which an unset variable without a default becomes a folder that does not exist.

    Raises ConfigError like it.
    """

    def variable(name: str, default: str | None) -> str:
        return os.environ.get(name, f"unset_{name}" if default is None else default)

    return load_config(path, overrides, variable)


def _open_shards(path: str) -> ShardSet | None:
    """The shards at a path on this machine; None if there are none. Remote ones would need the network."""
    if is_url(path) or not Path(path).exists():
        return None
    try:
        return ShardSet(path)
    except (DataError, StorageError):
        return None

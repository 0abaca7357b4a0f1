"""`arc-ds demo`: the complete pipeline on real input, small enough for two CPU cores (README, "demo")."""

from __future__ import annotations

import argparse
from pathlib import Path

from arc_ds.system.user_paths import path_argument


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `arc-ds demo`."""
    parser = subparsers.add_parser(
        "demo",
        description="Trains an ARC-Encoder for SmolLM2-135M on the State of the Union speeches in 5 to 15 minutes on "
        "two CPU cores. It builds shards, trains with one interruption, validates, exports, evaluates and plots.",
    )
    parser.add_argument(
        "--out", type=path_argument, default=Path("runs/demo"), help="folder to write (default runs/demo)"
    )
    parser.add_argument("--config", type=path_argument, help="another recipe than ds_configs/recipes/demo.yaml")
    parser.add_argument("--num-procs", type=int, help="number of processes (default: one per GPU, or one on the CPU)")
    parser.add_argument("--fresh", action="store_true", help="first delete an earlier demo in the folder")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides of the recipe")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; return 0 on success."""
    from arc_ds.demo.story import tell

    return tell(args.out, config=args.config, num_procs=args.num_procs, fresh=args.fresh, overrides=args.overrides)

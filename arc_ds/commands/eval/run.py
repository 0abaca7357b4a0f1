"""`arc-ds eval run`: answer the questions of a config with its systems, on one or several ranks."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from arc_ds.launch.exit_codes import EXIT_OK, EXIT_PREEMPTED
from arc_ds.system.user_paths import path_argument

HELP = "answer the questions of a config with its systems; the same command goes on after a stop"

_MODULE = "arc_ds.commands.eval.run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("config", type=path_argument, metavar="CONFIG.yaml", help="such as ds_configs/eval/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="config overrides")
    parser.add_argument("--num-procs", type=int, help="number of processes (default: one per GPU, or one on the CPU)")


def run(args: argparse.Namespace) -> int:
    """Run the command; return 0 on success.

    Under a launcher (`torchrun -m arc_ds.cli eval run …`) this is one rank. Otherwise it starts `--num-procs` ranks.
    """
    from arc_ds.evaluation.config import load_eval_config
    from arc_ds.launch.wrapper import choose_num_procs, launch
    from arc_ds.system import dist

    words = [str(args.config), *args.overrides]
    if not dist.under_launcher():
        config = load_eval_config(args.config, args.overrides)
        num_procs = choose_num_procs(args.num_procs, config.device)
        if num_procs > 1:
            code = launch(_MODULE, words, num_procs=num_procs, device_request=config.device)
            if code == EXIT_PREEMPTED:
                print(f"stopped; the finished batches are in {config.output}, and the same command goes on")
            elif code == EXIT_OK:
                print(f"predictions: {config.output}")
            return code
    return main(words)


def main(argv: Sequence[str]) -> int:
    """Evaluate as one rank, with the arguments `CONFIG.yaml [key.path=value ...]`; return the exit code."""
    from arc_ds.evaluation.config import load_eval_config
    from arc_ds.evaluation.runner import run_evaluation
    from arc_ds.launch.start import stoppable
    from arc_ds.system import dist

    dist.setup_logging()
    config = load_eval_config(argv[0], argv[1:])
    # The progress bar says how far it is, so the message of a long wait is left out.
    with stoppable("evaluating", logging.DEBUG, message="stopped; the finished batches are kept"):
        folder = run_evaluation(config)
    if not dist.under_launcher():
        print(f"predictions: {folder}")
    return EXIT_OK

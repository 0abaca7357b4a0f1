"""`arc-ds compare`: runs side by side, as text, as an offline page, and as files."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from functools import partial
from pathlib import Path

from arc_ds.comparison.evaluation import paired_table
from arc_ds.comparison.files import write_files
from arc_ds.comparison.find import find_inputs, find_store
from arc_ds.comparison.mlflow_runs import Store, find_run, log_files, open_store
from arc_ds.comparison.panels import AXES
from arc_ds.comparison.report import FEW_RUNS, Comparison, Options, compare_runs, to_json
from arc_ds.errors import ConfigError
from arc_ds.pages.tables import Table, to_text
from arc_ds.system.user_paths import path_argument, user_path
from arc_ds.tracking.registration import find_mlflow_run

_SHOWN = ("runs", "groups", "config", "evaluation", "speed", "environment")
_SHOWN_FOR_FEW = ("runs", "groups", "config", "at", "equal", "evaluation", "speed", "environment")
_ROWS, _ROWS_FOR_FEW = 25, 60  # of a table in the terminal
_ARTIFACTS = "comparison"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `arc-ds compare`."""
    parser = subparsers.add_parser(
        "compare",
        description="Compares training runs: the keys in which their configs differ, last, best and at-step values of "
        "metrics, curves with seeds grouped (runs whose configs differ in the seed only), evaluation scores, speed and "
        "memory. --out writes one HTML page that opens without a server, CSV files, and the main plots as PNG and SVG.",
    )
    parser.add_argument(
        "runs",
        type=user_path,
        nargs="*",
        metavar="RUN",
        help="folder of a run, folder that holds runs, result folder of an evaluation, or id or name of an MLflow run",
    )
    parser.add_argument("--experiment", metavar="NAME", help="all runs of an experiment in MLflow")
    parser.add_argument(
        "--tracking-uri",
        type=user_path,
        metavar="URI",
        help="MLflow's server or database, or the folder that holds it (default: MLFLOW_TRACKING_URI, or mlflow.db in "
        "$RUNS, . or ./runs)",
    )
    parser.add_argument(
        "--best",
        metavar="METRIC",
        help="metric that orders the runs; append :min or :max if its name does not tell (default: validation NLL, "
        "or else the training loss)",
    )
    parser.add_argument(
        "--metrics",
        action="append",
        default=[],
        metavar="PATTERN",
        help="show these metrics only, such as 'validation/*' (repeatable)",
    )
    parser.add_argument(
        "--at", type=int, metavar="STEP", help="step of the at-step values (default: the last common one)"
    )
    parser.add_argument("--x", choices=tuple(AXES), default="step", help="x-axis of the plots (default step)")
    parser.add_argument("--log", action="store_true", help="logarithmic y-axis for losses, norms and learning rates")
    parser.add_argument("--out", type=path_argument, metavar="DIR", help="write page, CSV files and pictures there")
    parser.add_argument(
        "--log-to",
        type=user_path,
        metavar="RUN",
        help="log the page and its files as artifacts of this run (folder, id or name)",
    )
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    if not args.runs and args.experiment is None:
        raise ConfigError(
            "nothing to compare. Give runs, or --experiment NAME. `arc-ds compare --help` lists the options."
        )
    target = None if args.log_to is None else _log_target(args.log_to, args.tracking_uri)
    inputs = find_inputs(args.runs, args.experiment, args.tracking_uri)
    extra = [paired_table(inputs.results)] if inputs.results else []
    if not inputs.runs:
        if args.out is not None or args.log_to is not None or args.json:
            raise ConfigError("only result folders were given. Use arc-ds eval report for their page, or add runs.")
        print(*map(to_text, extra), sep="\n\n")
        return 0
    options = Options(best=args.best, at_step=args.at, metrics=tuple(args.metrics), axis=args.x, is_log=args.log)
    comparison = compare_runs(inputs.runs, options)
    print(json.dumps(to_json(comparison, extra), indent=2) if args.json else _summary(comparison, extra))
    if args.out is None and target is None:
        return 0
    # With --json, standard output holds the JSON alone.
    report = partial(print, file=sys.stderr if args.json else sys.stdout)
    with tempfile.TemporaryDirectory(prefix="arc_ds_compare_") as made:
        paths = _write(comparison, args.out or Path(made), args, extra)
        if args.out is not None:
            report(f"\nwrote {paths[0]} and {len(paths) - 1} more files")
        if target is not None:
            log_files(*target, paths, _ARTIFACTS)
            report(f"logged the page to {_ARTIFACTS}/ of the run {target[1]}")
    return 0


def _log_target(name: str, uri: str | None) -> tuple[Store, str]:
    """The store and the id of the run to log to. name: its folder, id or name."""
    if Path(name).is_dir():
        found, run_id = find_mlflow_run(Path(name), uri)
        return open_store(found), run_id
    store = find_store(uri, [name])
    return store, find_run(store, name).info.run_id


def _summary(comparison: Comparison, extra: list[Table]) -> str:
    """The tables for the terminal."""
    shown = _SHOWN if len(comparison.runs) > FEW_RUNS else _SHOWN_FOR_FEW
    tables = [comparison.tables[name] for name in shown if name in comparison.tables]
    notes = [f"note: {note}" for note in comparison.notes]
    equal = [] if "config" in comparison.tables else ["The configs of the runs are equal."]
    texts = [to_text(table, _ROWS if len(comparison.runs) > FEW_RUNS else _ROWS_FOR_FEW) for table in (*tables, *extra)]
    return "\n\n".join([" ".join(comparison.verdict), *texts, *equal, *(["\n".join(notes)] if notes else [])])


def _write(comparison: Comparison, folder: Path, args: argparse.Namespace, extra: list[Table]) -> list[Path]:
    title = f"Experiment {args.experiment}" if args.experiment else f"Comparison of {len(comparison.runs)} runs"
    command = shlex.join(["arc-ds", "compare", *sys.argv[2:]])
    return write_files(comparison, folder, title=title, command=command, extra=extra)

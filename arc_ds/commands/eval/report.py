"""`arc-ds eval report`."""

from __future__ import annotations

import argparse

from arc_ds.commands.eval.result_arguments import add_results, read_arguments
from arc_ds.evaluation.report import write_report
from arc_ds.evaluation.report.content import make_report
from arc_ds.evaluation.report.tables import METRICS
from arc_ds.system.user_paths import path_argument

HELP = "write a page with tables, plots and differing samples, and Markdown and CSV"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommand."""
    parser.description = (
        "Writes report.html (one page that needs no other file), report.md, scores.csv and differences.csv. The table "
        "has the shape of the paper's Table 1. Every other system is compared with the baseline system on the same "
        "questions. Results of other ids, references, data or protocols are refused."
    )
    add_results(parser, "RESULT")
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="folder of the report")
    parser.add_argument(
        "--baseline", metavar="SYSTEM", help="system with which the others are compared (default: the first)"
    )
    parser.add_argument(
        "--metric", choices=METRICS, metavar="METRIC", help=f"metric in place of each task's own: {', '.join(METRICS)}"
    )
    parser.add_argument("--paper", action="store_true", help="show the paper's numbers next to the scores")
    parser.add_argument("--samples", type=int, default=300, metavar="N", help="most samples on the page (default: 300)")
    parser.add_argument(
        "--force", action="store_true", help="compare different data or protocols on common questions, and say so"
    )


def run(namespace: argparse.Namespace) -> int:
    """Run the subcommand; return its exit code."""
    report = make_report(
        read_arguments(namespace),
        baseline=namespace.baseline,
        metric=namespace.metric,
        force=namespace.force,
        max_samples=max(0, namespace.samples),
    )
    for path in write_report(report, namespace.out, with_paper=namespace.paper):
        print(path)
    return 0

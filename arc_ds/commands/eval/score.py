"""`arc-ds eval score`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence

from arc_ds.commands.eval.result_arguments import add_results, json_number, read_arguments
from arc_ds.comparison.find import find_store
from arc_ds.evaluation.metrics import signature
from arc_ds.evaluation.results import SEEDS_NOTE
from arc_ds.evaluation.scoring import Score, SystemScores, is_bleu_lowercase, score_system
from arc_ds.evaluation.tables import metric_table
from arc_ds.pages.tables import to_text
from arc_ds.system.user_paths import user_path

HELP = "score files of predictions, with intervals"

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommand."""
    parser.description = (
        "Scores result folders and JSONL files of any program. Each line needs id, task, prediction and references; "
        "cluster names samples that are not independent, such as questions on one paragraph. Intervals are those of a "
        "bootstrap over clusters. --json prints {task: {metric: {value, low, high, n}}} in points of 100, and nll in "
        "nats per token; with several systems, an object of these by the systems' names."
    )
    add_results(parser, "FILE")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument(
        "--log",
        metavar="EXPERIMENT",
        help="log scores and answers into MLflow: into the run that trained a system's model, at the step of its "
        "checkpoint, or else into a run of their own in this experiment",
    )
    parser.add_argument(
        "--tracking-uri",
        type=user_path,
        metavar="URI",
        help="MLflow's server or database, or the folder that holds it, for --log (default: that of arc-ds compare)",
    )


def run(namespace: argparse.Namespace) -> int:
    """Run the subcommand; return its exit code."""
    systems = read_arguments(namespace)
    store = None if namespace.log is None else find_store(namespace.tracking_uri)
    scores = [score_system(system) for system in systems]
    for each in scores:
        _warn(each)
    if namespace.json:
        found = {each.name: _json(each) for each in scores}
        print(json.dumps(next(iter(found.values())) if len(found) == 1 else found, indent=2, ensure_ascii=False))
    else:
        _print(scores)
    if store is not None:
        from arc_ds.evaluation.log import log_scores  # imports torch

        for name, run_id in log_scores(scores, store.uri, namespace.log).items():
            print(f"{name}: logged in the MLflow run {run_id}", file=sys.stderr)
    return 0


def _print(scores: Sequence[SystemScores]) -> None:
    print(to_text(metric_table(scores)))
    metrics = dict.fromkeys(metric for each in scores for task in each.by_task.values() for metric in task)
    print()
    for metric in metrics:
        lowercase = (is_bleu_lowercase(each.results) for each in scores)
        signatures = dict.fromkeys(signature(metric, bleu_lowercase=each) for each in lowercase)
        print(f"{metric}: {'; '.join(signatures)}")
    if any(len(each.results.seeds) > 1 for each in scores):
        print(SEEDS_NOTE)


def _warn(scores: SystemScores) -> None:
    """Warn of answers that a score hides: empty ones, those to blank references, and those that `eval run` left out."""
    for task, stats in scores.stats.items():
        if stats.num_empty:
            logger.warning(
                "%s: %d predictions of task %s are empty; they are scored as such", scores.name, stats.num_empty, task
            )
        if stats.num_blank and "substring" in stats.by_metric:
            logger.warning(
                "%s: %d answers of task %s have a reference without text, which 'substring' finds in every prediction; "
                "remove such references",
                *(scores.name, stats.num_blank, task),
            )
        for reason, numbers in scores.results.seeds[0].skipped.items():
            if numbers.get(task):
                logger.warning(
                    "%s: %d questions of task %s were not asked (%s); the scores leave them out",
                    *(scores.name, numbers[task], task, reason),
                )


def _json(scores: SystemScores) -> dict[str, dict[str, dict[str, float | None]]]:
    def record(score: Score) -> dict[str, float | None]:
        return {name: json_number(getattr(score, name)) for name in ("value", "low", "high", "n")}

    return {task: {metric: record(score) for metric, score in of.items()} for task, of in scores.by_task.items()}

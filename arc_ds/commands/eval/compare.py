"""`arc-ds eval compare`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from arc_ds.commands.eval.result_arguments import add_results, json_number, read_arguments
from arc_ds.errors import ConfigError
from arc_ds.evaluation.comparison import Comparison, Difference, compare_systems
from arc_ds.evaluation.results import SEEDS_NOTE
from arc_ds.evaluation.tables import comparison_table
from arc_ds.pages.tables import to_text

HELP = "compare systems on the same questions, with paired intervals and tests"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommand."""
    parser.description = (
        "Compares each further system with the first one. Answers are joined by task and id. Results of other ids, "
        "references, data or protocols are refused. The difference is that of the further system minus the first one. "
        "'detectable' is the smallest difference that 80% of experiments of this size find. The p-values of the tasks' "
        "first metrics are adjusted for the number of tasks (Holm)."
    )
    add_results(parser, "RESULT")
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")


def run(namespace: argparse.Namespace) -> int:
    """Run the subcommand; return its exit code."""
    systems = read_arguments(namespace)
    if len(systems) < 2:
        raise ConfigError(f"{namespace.results[0]} holds one system; expected two or more. Name another result.")
    comparisons = compare_systems(*systems)
    if namespace.json:
        found = {each.second: _json(each) for each in comparisons}
        print(json.dumps({"first": systems[0].name, "systems": found}, indent=2, ensure_ascii=False))
    else:
        print(to_text(comparison_table(comparisons)))
        if any(len(each.seeds) > 1 for each in systems):
            print(f"\n{SEEDS_NOTE}")
    return 0


def _json(comparison: Comparison) -> dict[str, object]:
    return {
        "tasks": {
            task: {metric: _record(difference) for metric, difference in metrics.items()}
            for task, metrics in comparison.by_task.items()
        },
        "average": None if comparison.average is None else _record(comparison.average),
    }


def _record(difference: Difference) -> dict[str, object]:
    values = asdict(difference)
    return {name: json_number(value) if isinstance(value, float) else value for name, value in values.items()}

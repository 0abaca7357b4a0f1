"""The comparison of runs as tables and plots."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from arc_ds.comparison.configs import (
    RunGroup,
    check_held_out,
    config_differences,
    fact_differences,
    group_by_seed,
    held_out_notes,
    is_incomparable,
    shorten,
)
from arc_ds.comparison.equal_work import equal_work_table
from arc_ds.comparison.panels import Axis, Panel, make_panel, x_axes
from arc_ds.comparison.runs import ComparedRun, metric_names
from arc_ds.comparison.summary import (
    SPEED,
    Direction,
    Point,
    Summary,
    common_step,
    direction_of,
    evaluation_scores,
    non_finite_counts,
    order_by,
    parse_best,
    select_metrics,
    speed_and_memory,
    summarize,
)
from arc_ds.comparison.tables import number_cell, transposed
from arc_ds.comparison.verdict import behind, best_values, full_members, make_verdict
from arc_ds.errors import DataError
from arc_ds.pages.axes import number
from arc_ds.pages.frame import NUM_COLOURS
from arc_ds.pages.tables import EMPTY, Cell, Table

FEW_RUNS = 6  # so many runs are columns; more are rows
MAX_MAIN = 9
_CONFIG_COLUMNS = 6
_BINS_FEW, _BINS_MANY = 240, 100
_LOG_SCALED = ("loss", "nll", "perplexity", "grad_norm", "lr/")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The content of a comparison.

    best: metric that orders the runs, with `:min` or `:max` if its name does not tell; None for a usual one.
    at_step: step of the at-step column; None for the last step that all runs reached.
    metrics: patterns of the shown metrics; all if empty.
    axis: x-axis of the plots.
    is_log: logarithmic y-axis for losses, norms and rates.
    """

    best: str | None = None
    at_step: int | None = None
    metrics: tuple[str, ...] = ()
    axis: Axis = "step"
    is_log: bool = False


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The comparison of runs.

    groups: seeds grouped; the best group comes first.
    metrics: shown metrics; the first `num_main` of them are the main ones.
    tables: "runs", "groups" if there are seeds, "config", "last", "best", "at", "equal", "evaluation", "speed",
        "environment"; those without rows are left out.
    verdict: sentences on the first two groups.
    notes: sentences about faults and about what the reader must know.
    """

    runs: tuple[ComparedRun, ...]
    groups: tuple[RunGroup, ...]
    best: tuple[str, Direction]
    at_step: int
    metrics: tuple[str, ...]
    num_main: int
    tables: dict[str, Table]
    x_label: str
    verdict: tuple[str, ...]
    notes: tuple[str, ...]
    options: Options


def make_panels(comparison: Comparison) -> list[Panel]:
    """The plots of all shown metrics, in their order, with a progress bar."""
    axes, label = x_axes(comparison.runs, comparison.options.axis)
    is_many = len(comparison.groups) > NUM_COLOURS
    return [
        make_panel(
            metric,
            comparison.runs,
            comparison.groups,
            axes,
            x_label=label,
            bins=_BINS_MANY if is_many else _BINS_FEW,
            is_log=comparison.options.is_log and any(part in metric for part in _LOG_SCALED),
            with_members=not is_many,
        )
        for metric in tqdm(comparison.metrics, desc="plots", unit="plot", disable=None, leave=False)
    ]


def compare_runs(runs: Sequence[ComparedRun], options: Options) -> Comparison:
    """Compare runs.

    Raises DataError if no run has metrics, a metric is unknown, or the runs have no common x-axis.
    """
    every = metric_names(runs)
    check_held_out(runs, options.best)
    comparable = [name for name in every if not (options.best is None and is_incomparable(name, runs))]
    best, direction = parse_best(options.best, comparable or every)
    runs = [runs[place] for place in order_by(runs, best, direction)]
    selected = select_metrics(options.metrics, every)
    main = main_metrics(selected, best)
    metrics = _by_importance(selected, main)
    at_step = common_step(runs) if options.at_step is None else options.at_step
    if at_step < 0:
        raise DataError(f"--at is {at_step}; expected a step from 0 on.")
    _, x_label = x_axes(runs, options.axis)
    differences = config_differences(runs)
    groups = _by_mean(group_by_seed(runs, differences), runs, best, direction, at_step)
    group_of = {member: place for place, group in enumerate(groups) for member in group.members}
    names = [Cell(run.name, run.name, group=group_of[place]) for place, run in enumerate(runs)]
    tables = [
        _runs_table(runs, names, differences, best, direction, at_step),
        _groups_table(runs, groups, best, direction, at_step),
        _config_table(names, differences),
        *_value_tables(runs, names, metrics, at_step),
        _turned(equal_work_table(runs, names, metrics, options.axis), "metric"),
        _evaluation_table(runs, names),
        _speed_table(runs, names),
        _environment_table(runs, names),
    ]
    return Comparison(
        runs=tuple(runs),
        groups=tuple(groups),
        best=(best, direction),
        at_step=at_step,
        metrics=tuple(metrics),
        num_main=len(main),
        tables={table.name: table for table in tables if table.rows},
        x_label=x_label,
        verdict=tuple(make_verdict(runs, groups, best, direction, at_step)),
        notes=tuple(_notes(runs, groups, differences, at_step, options.axis)),
        options=options,
    )


def _by_mean(
    groups: Sequence[RunGroup], runs: Sequence[ComparedRun], best: str, direction: Direction, at_step: int
) -> list[RunGroup]:
    """The groups by the mean of their runs' best values, so that a lucky seed does not decide."""
    sign = 1 if direction == "min" else -1

    def key(group: RunGroup) -> tuple[bool, float]:
        values = best_values(group, runs, best, direction, at_step)
        return not values, sign * float(np.mean(values)) if values else 0.0

    return sorted(groups, key=key)


def main_metrics(metrics: Sequence[str], best: str) -> list[str]:
    """The metrics that tell most: the one that orders the runs, the loss, held-out losses, gaps and scores."""
    patterns = (re.escape(best), "train/loss", ".*/nll_compressed", "eval/.*/(em|f1|rouge_l|bleu)", ".*/gap_closed")
    found = [name for pattern in patterns for name in metrics if re.fullmatch(pattern, name)]
    return list(dict.fromkeys(found))[:MAX_MAIN]


def _by_importance(metrics: Sequence[str], main: Sequence[str]) -> list[str]:
    """The main metrics, and then the others by section, which is the first part of their name."""
    sections = ("train", "validation", "eval", "lr", "speed", "memory")

    def key(name: str) -> tuple[int, str]:
        section = name.partition("/")[0]
        return sections.index(section) if section in sections else len(sections), name

    return [*main, *sorted(set(metrics) - set(main), key=key)]


def _cell(point: Point | None, with_step: bool = False) -> Cell:
    return EMPTY if point is None else number_cell(point.value, f"at {point.step:,}" if with_step else "")


def _runs_table(
    runs: Sequence[ComparedRun],
    names: Sequence[Cell],
    differences: dict[str, list[str]],
    best: str,
    direction: Direction,
    at_step: int,
) -> Table:
    keys = list(differences)[:_CONFIG_COLUMNS] if len(runs) > FEW_RUNS else []
    shown = {key: _value_cells(differences[key]) for key in keys}
    heads = _short_keys(keys)
    sign = 1 if direction == "min" else -1
    lead = summarize(runs[0].curves.get(best), direction, at_step).best
    rows = []
    for place, run in enumerate(runs):
        found = summarize(run.curves.get(best), direction, at_step)
        speed = speed_and_memory(run)
        rows.append(
            (
                names[place],
                _cell(found.best, with_step=True),
                number_cell(sign * (found.best.value - lead.value) if found.best and lead else None),
                _cell(found.at),
                _cell(found.last),
                number_cell(float(run.last_step)),
                number_cell(speed.get("encoder tokens/s")),
                number_cell(speed.get("peak memory, GiB")),
                *(shown[key][place] for key in keys),
            )
        )
    columns = (
        "run",
        "best",
        "behind the first",
        f"at step {at_step:,}",
        "last",
        "steps",
        "encoder tokens/s",
        "peak GiB",
        *heads,
    )
    caption = f"Ordered by {best}, {'low' if direction == 'min' else 'high'} values first."
    if len(differences) > len(keys) and keys:
        caption += f" {len(differences) - len(keys)} more differing keys are in the table of config differences."
    return Table("runs", "Runs", columns, tuple(rows), caption)


def _short_keys(keys: Sequence[str]) -> list[str]:
    """The last parts of keys, or whole keys if several have the same end."""
    last = [key.rpartition(".")[2] for key in keys]
    return [end if last.count(end) == 1 and not end.isdigit() else key for key, end in zip(keys, last, strict=True)]


def _groups_table(
    runs: Sequence[ComparedRun], groups: Sequence[RunGroup], best: str, direction: Direction, at_step: int
) -> Table:
    """Mean and standard deviation over the seeds of each group, of the ordering metric and the evaluation scores."""
    columns, rows = ("config", "seeds", "best", "behind the first", f"at step {at_step:,}", "last"), []
    scores = evaluation_scores(runs)
    if any(len(group.members) > 1 for group in groups):
        values = [best_values(group, runs, best, direction, at_step) for group in groups]
        for place, group in enumerate(groups):
            members = full_members(group, runs, at_step)
            found = [summarize(runs[member].curves.get(best), direction, at_step) for member in members]
            means = [_over_seeds([getattr(each, field) for each in found]) for field in ("best", "at", "last")]
            means += [_over_seeds([of_runs[member] for member in members]) for of_runs in scores.values()]
            gap = EMPTY
            if place and values[0] and values[place]:
                value, low, high = behind(values[0], values[place], direction)
                gap = number_cell(value, "" if np.isnan(low) else f"[{number(low)}, {number(high)}]")
            name = Cell(group.label, group.label, group=place)
            rows.append((name, number_cell(float(len(members))), means[0], gap, *means[1:]))
    caption = (
        f"{best}: mean ± standard deviation over runs whose configs differ in the seed only. Runs that ended before "
        f"step {at_step:,} are left out. “Behind the first” has a 95% interval (Welch) if both have two or more seeds."
    )
    return Table("groups", "Seeds", (*columns, *scores), tuple(rows), caption)


def _over_seeds(points: Sequence[Point | None]) -> Cell:
    values = [point.value for point in points if point is not None]
    if not values:
        return EMPTY
    with np.errstate(all="ignore"):  # of infinite and huge values
        mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return number_cell(mean, f"± {deviation:.2g}" if math.isfinite(deviation) else "")


def _value_cells(values: Sequence[str]) -> list[Cell]:
    """Cells of a key's values. Numbers are sorted as numbers; a digest such as 12e456 is none."""
    return [Cell(text, _value(value)) for text, value in zip(shorten(values), values, strict=True)]


def _value(text: str) -> float | str:
    for kind in (int, float):
        try:
            if str(kind(text)) == text:
                return kind(text)
        except ValueError:
            continue
    return text


def _turned(table: Table, corner: str) -> Table:
    """The table of runs, with runs as columns if they are few."""
    return transposed(table, corner) if 0 < len(table.rows) <= FEW_RUNS else table


def _config_table(names: Sequence[Cell], differences: dict[str, list[str]]) -> Table:
    columns = [_value_cells(values) for values in differences.values()]
    rows = tuple((name, *(column[place] for column in columns)) for place, name in enumerate(names))
    return _turned(Table("config", "Config differences", ("run", *differences), rows if differences else ()), "key")


def _value_tables(
    runs: Sequence[ComparedRun], names: Sequence[Cell], metrics: Sequence[str], at_step: int
) -> list[Table]:
    """The last, best and at-step values of all shown metrics."""
    found = {name: [summarize(run.curves.get(name), direction_of(name), at_step) for run in runs] for name in metrics}
    titles = {"last": "Last value", "best": "Best value", "at": f"Value at step {at_step:,}"}
    return [_value_table(names, found, field, title) for field, title in titles.items()]


def _value_table(names: Sequence[Cell], found: dict[str, list[Summary]], field: str, title: str) -> Table:
    columns = {
        metric: [_cell(getattr(each, field), with_step=field == "best") for each in values]
        for metric, values in found.items()
        if field != "best" or direction_of(metric) is not None
    }
    rows = tuple((name, *(column[place] for column in columns.values())) for place, name in enumerate(names))
    return _turned(Table(field, title, ("run", *columns), rows if columns else ()), "metric")


def _evaluation_table(runs: Sequence[ComparedRun], names: Sequence[Cell]) -> Table:
    scores = evaluation_scores(runs)
    rows = tuple((name, *(_cell(values[place]) for values in scores.values())) for place, name in enumerate(names))
    caption = "Last scores logged as eval/TASK/METRIC. They are no paired tests: give result folders for these."
    return Table("evaluation", "Evaluation", ("run", *scores), rows if scores else (), caption)


def _speed_table(runs: Sequence[ComparedRun], names: Sequence[Cell]) -> Table:
    found = [speed_and_memory(run) for run in runs]
    titles = [title for title, _, _ in SPEED if any(title in each for each in found)]
    rows = tuple(
        (name, *(number_cell(each.get(title)) for title in titles)) for name, each in zip(names, found, strict=True)
    )
    caption = "Medians over the reports of a run, without the first one, which warms up. Memory is the peak."
    return Table("speed", "Speed and memory", ("run", *titles), rows if titles else (), caption)


def _environment_table(runs: Sequence[ComparedRun], names: Sequence[Cell]) -> Table:
    differences = fact_differences(runs)
    table = _config_table(names, differences)
    return Table("environment", "Environment differences", table.columns, table.rows)


def _notes(
    runs: Sequence[ComparedRun],
    groups: Sequence[RunGroup],
    differences: dict[str, list[str]],
    at_step: int,
    axis: Axis,
) -> list[str]:
    notes = [*held_out_notes(runs), *(f"{run.name}: {note}" for run in runs for note in run.notes)]
    notes += [
        f"{run.name}: It has no {'config.yaml' if '/' in run.source else 'config'}." for run in runs if not run.config
    ]
    short = [run.name for run in runs if run.curves and run.last_step < at_step]
    if short:
        listed = ", ".join(short[:5]) + (f" and {len(short) - 5} more" if len(short) > 5 else "")
        means = " Means over seeds leave such runs out." if len(groups) < len(runs) else ""
        notes.append(f"{listed} ended before step {at_step:,}; the at-step value is the last one before.{means}")
    if axis == "step" and "data.batch_size" in differences:
        notes.append(
            "data.batch_size differs, so equal steps are not equal work. Compare with --x tokens or --x flops."
        )
    if axis == "step" and "steps" in differences:
        notes.append("steps differs, so at equal steps the runs are at other places of their learning-rate schedules.")
    for run in runs:
        # A gap is not defined if the full text does not help.
        lost = {name: num for name, num in non_finite_counts(run.curves).items() if not name.endswith("gap_closed")}
        if lost:
            listed = ", ".join(f"{name} {num}" for name, num in list(lost.items())[:3])
            notes.append(f"{run.name}: NaN or infinite values: {listed}{', …' if len(lost) > 3 else ''}.")
    return notes


def to_json(comparison: Comparison, extra: Sequence[Table] = ()) -> dict[str, Any]:
    """The comparison as JSON: differences, and last, best and at-step values of every shown metric of each run.

    extra: further tables, each a list of objects under its name.
    """
    metric, direction = comparison.best
    differences = config_differences(comparison.runs)
    group_of = {member: group.label for group in comparison.groups for member in group.members}

    def point(found: Point | None) -> dict[str, float | str] | None:
        if found is None:
            return None
        # JSON has no NaN and no infinity.
        return {"step": found.step, "value": found.value if np.isfinite(found.value) else str(found.value)}

    def values(run: ComparedRun, name: str) -> dict[str, Any]:
        found = summarize(run.curves[name], direction_of(name), comparison.at_step)
        return {"last": point(found.last), "best": point(found.best), "at": point(found.at)}

    return {
        "best": {"metric": metric, "direction": direction},
        "at_step": comparison.at_step,
        "notes": list(comparison.notes),
        "runs": [
            {
                "name": run.name,
                "source": run.source,
                "group": group_of[place],
                "last_step": run.last_step,
                "differences": {key: found[place] for key, found in differences.items()},
                "metrics": {name: values(run, name) for name in comparison.metrics if name in run.curves},
                "speed": speed_and_memory(run),
                "facts": dict(run.facts),
            }
            for place, run in enumerate(comparison.runs)
        ],
        **{
            table.name: [dict(zip(table.columns, (cell.value for cell in row), strict=True)) for row in table.rows]
            for table in extra
        },
    }

"""Numbers of runs: last, best and at a step; speed and memory."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import numpy as np

from arc_ds.comparison.runs import ComparedRun, Curve
from arc_ds.errors import DataError

Direction = Literal["min", "max"]

_HIGHER = re.compile(
    r"(gap_closed|mfu|_per_s|accuracy|(^|/)(em|f1|substring|approx_em|rouge_l|bleu|chrf)(_\w+)?)$", re.IGNORECASE
)
_LOWER = re.compile(r"(loss|nll|perplexity|step_s|seconds|peak_gib|wait_s|wait_share)(/|_|$)", re.IGNORECASE)
_FIRST_CHOICES = (
    "validation/*/continuation/nll_compressed",
    "validation/*/nll_compressed",
    "train/loss",
    "*loss*",
    "*nll*",
)
_SHARE_OF_LONGEST = 0.5

# Metrics of the table of speed and memory: title, metric, factor of the shown value.
SPEED = (
    ("encoder tokens/s", "speed/encoder_tokens_per_s", 1.0),
    ("decoder rows/s", "speed/decoder_rows_per_s", 1.0),
    ("MFU, %", "train/mfu", 100.0),
    ("step, s", "speed/step_s", 1.0),
    ("waits for data, %", "speed/data_wait_share", 100.0),
    ("peak memory, GiB", "memory/peak_gib", 1.0),
)


class Point(NamedTuple):
    """A value and its step."""

    step: int
    value: float


class Summary(NamedTuple):
    """A metric of a run. Every field is None if there is no such point.

    last: the last point.
    best: the best finite point; None also for metrics of which neither high nor low values are better.
    at: the last point up to the given step.
    """

    last: Point | None
    best: Point | None
    at: Point | None


def direction_of(metric: str) -> Direction | None:
    """Whether high or low values of a metric are better; None if its name does not tell."""
    if _HIGHER.search(metric):
        return "max"
    return "min" if _LOWER.search(metric) else None


def summarize(curve: Curve | None, direction: Direction | None, at_step: int) -> Summary:
    """Last, best and at-step point of a metric. curve: None if the run does not have the metric."""
    if curve is None or not len(curve.steps):
        return Summary(None, None, None)
    until = int(np.searchsorted(curve.steps, at_step, side="right")) - 1
    best = None
    finite = np.flatnonzero(np.isfinite(curve.values))
    if direction is not None and len(finite):
        values = curve.values[finite]
        best = _point(curve, int(finite[values.argmin() if direction == "min" else values.argmax()]))
    return Summary(_point(curve, len(curve.steps) - 1), best, _point(curve, until) if until >= 0 else None)


def _point(curve: Curve, place: int) -> Point:
    return Point(int(curve.steps[place]), float(curve.values[place]))


def common_step(runs: Sequence[ComparedRun]) -> int:
    """The last step that all runs reached, see `common_end`."""
    return int(common_end([run.last_step for run in runs if run.curves]))


def common_end(ends: Sequence[float]) -> float:
    """The last place that all runs reached. Runs that ended before half of the longest one do not count."""
    return min(end for end in ends if end >= _SHARE_OF_LONGEST * max(ends))


def parse_best(text: str | None, metrics: Sequence[str]) -> tuple[str, Direction]:
    """The metric by which runs are ordered, and its direction.

    text: METRIC, METRIC:min or METRIC:max; None for the first of the usual ones that the runs have.

    Raises DataError that names the nearest metrics if there is no such metric.
    """
    if text is None:
        found = [name for choice in _FIRST_CHOICES for name in metrics if fnmatchcase(name, choice)]
        name = (found or list(metrics))[0]
        return name, direction_of(name) or "min"
    name, _, end = text.rpartition(":")
    if end not in ("min", "max"):
        name, end = text, ""
    (name,) = _known([name], metrics)
    return name, "max" if (end or direction_of(name)) == "max" else "min"


def select_metrics(patterns: Sequence[str], metrics: Sequence[str]) -> list[str]:
    """The metrics that match any of the patterns (`*` and `?`), in the order of the patterns; all if there are none.

    Raises DataError that names the nearest metrics if a pattern matches none.
    """
    if not patterns:
        return list(metrics)
    found: dict[str, None] = {}
    for pattern in patterns:
        matches = [name for name in metrics if fnmatchcase(name, pattern)]
        found.update(dict.fromkeys(matches or _known([pattern], metrics)))
    return list(found)


def _known(names: Sequence[str], metrics: Sequence[str]) -> Sequence[str]:
    for name in names:
        if name not in metrics:
            inside = [each for each in metrics if name.strip("*").lower() in each.lower()]
            near = list(dict.fromkeys((*inside, *get_close_matches(name, metrics, n=5, cutoff=0.3))))[:5]
            raise DataError(
                f"no run has the metric {name!r}. Nearest of the {len(metrics)} metrics: "
                f"{', '.join(near or metrics[:5])}. Patterns such as 'validation/*' match several."
            )
    return names


def speed_and_memory(run: ComparedRun) -> dict[str, float]:
    """Median speed and largest memory of a run, by title of `SPEED`. The first report, which warms up, is left out."""
    found = {}
    for title, metric, factor in SPEED:
        curve = run.curves.get(metric)
        if curve is None or not len(finite := curve.values[np.isfinite(curve.values)]):
            continue
        steady = finite[1:] if len(finite) > 1 else finite
        found[title] = factor * float(finite.max() if metric.startswith("memory/") else np.median(steady))
    return found


def evaluation_scores(runs: Sequence[ComparedRun]) -> dict[str, list[Point | None]]:
    """The last score of each run by `TASK/METRIC`, for scores logged as `eval/TASK/METRIC`."""
    names = sorted({name for run in runs for name in run.curves if name.startswith("eval/") and name.count("/") >= 2})
    return {name.partition("/")[2]: [summarize(run.curves.get(name), None, 0).last for run in runs] for name in names}


def order_by(runs: Sequence[ComparedRun], metric: str, direction: Direction) -> list[int]:
    """Places of the runs, best value of the metric first, and runs without it last."""
    sign = 1 if direction == "min" else -1

    def key(place: int) -> tuple[bool, float]:
        best = summarize(runs[place].curves.get(metric), direction, 0).best
        return best is None, sign * best.value if best else 0.0

    return sorted(range(len(runs)), key=key)


def non_finite_counts(curves: Mapping[str, Curve]) -> dict[str, int]:
    """Number of NaN and infinite values by metric, for metrics that have any."""
    counts = {name: int(np.count_nonzero(~np.isfinite(curve.values))) for name, curve in curves.items()}
    return {name: num for name, num in counts.items() if num}

"""The distance of runs from the first one, and whether seeds alone may explain it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from arc_ds.comparison.configs import SEED, RunGroup, config_differences, shorten
from arc_ds.comparison.runs import ComparedRun
from arc_ds.comparison.summary import Direction, summarize
from arc_ds.evaluation.statistics import student_quantile
from arc_ds.pages.axes import number, tick_texts

_MAX_KEYS = 4


def full_members(group: RunGroup, runs: Sequence[ComparedRun], at_step: int) -> list[int]:
    """The runs of a group that reached a step; all of them if none did. Means over seeds leave out the others."""
    return [member for member in group.members if runs[member].last_step >= at_step] or list(group.members)


def best_values(
    group: RunGroup, runs: Sequence[ComparedRun], metric: str, direction: Direction, at_step: int
) -> list[float]:
    """The best value of a metric of each run of a group that reached a step."""
    found = [summarize(runs[n].curves.get(metric), direction, 0).best for n in full_members(group, runs, at_step)]
    return [point.value for point in found if point is not None]


def behind(first: Sequence[float], other: Sequence[float], direction: Direction) -> tuple[float, float, float]:
    """The distance of a group's mean over seeds from that of the first group, with its 95% interval.

    The interval is Welch's with the degrees of freedom of the group with fewer seeds, which is conservative. It is NaN
    if one of them has a single seed. Positive values are worse than the first group.
    """
    sign = 1 if direction == "min" else -1
    value = sign * float(np.mean(other) - np.mean(first))
    degrees = min(len(first), len(other)) - 1
    if degrees < 1:
        return value, math.nan, math.nan
    stderr = math.sqrt(sum(float(np.var(values, ddof=1)) / len(values) for values in (first, other)))
    half = student_quantile(0.975, degrees) * stderr
    return value, value - half, value + half


def make_verdict(
    runs: Sequence[ComparedRun], groups: Sequence[RunGroup], metric: str, direction: Direction, at_step: int
) -> list[str]:
    """Sentences that compare the first two groups: their values, the chance of seeds, and their configs.

    groups: the best one first.
    """
    found = [(group, best_values(group, runs, metric, direction, at_step)) for group in groups]
    known = [(group, values) for group, values in found if values]
    kind = f"{metric} ({'low' if direction == 'min' else 'high'} values are better)"
    if len(known) < 2:
        return [
            f"Only {group.label} has a value of {kind}: {number(float(np.mean(values)))}." for group, values in known
        ]
    (first, ours), (second, theirs) = known[:2]
    our_text, their_text = tick_texts([float(np.mean(ours)), float(np.mean(theirs))])
    value, low, high = behind(ours, theirs, direction)
    sentences = [
        f"First by {kind}: {first.label}, best value {our_text}. Next: {second.label}, best value {their_text}, which "
        f"is {number(abs(value))} {'worse' if value >= 0 else 'better'}."
    ]
    if math.isnan(low):
        sentences.append("Seeds alone may explain this difference: its interval needs two seeds of each config.")
    else:
        interval = f"[{number(low)}, {number(high)}] over {len(ours)} and {len(theirs)} seeds"
        is_clear = low > 0 or high < 0
        sentences.append(
            f"The 95% interval of the difference is {interval}: "
            f"{'seeds alone do not explain it' if is_clear else 'seeds alone may explain it'}."
        )
    pair = config_differences([runs[first.members[0]], runs[second.members[0]]])
    changes = [f"{key} ({' and '.join(shorten(values))})" for key, values in pair.items() if key != SEED]
    if changes:
        more = f", and {len(changes) - _MAX_KEYS} more keys" if len(changes) > _MAX_KEYS else ""
        sentences.append(f"Their configs differ in {', '.join(changes[:_MAX_KEYS])}{more}.")
    return sentences

"""Paired comparison of two systems on the same questions.

Both systems see the same drawn clusters, so the interval is that of the paired difference. Tests: exact McNemar for
exact match of single samples; otherwise signs of whole clusters are flipped, which exchanges both systems' answers to
them. P-values of the headline metrics are adjusted for the number of tasks by Holm's method.

Intervals of three or more training seeds include the spread of seeds, and the test is Welch's t test. With fewer
seeds, tests take the mean over seeds of each answer's statistics: intervals and tests hold for these seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from arc_ds.errors import DataError
from arc_ds.evaluation.metrics import bounds_of, is_mean
from arc_ds.evaluation.results import ResultFile, SystemResults
from arc_ds.evaluation.scoring import (
    SystemScores,
    TaskStats,
    by_task,
    check_same_questions,
    cluster_sums,
    influence,
    is_bleu_lowercase,
    mean_of_groups,
    score_system,
    seed_scores,
    with_clusters,
)
from arc_ds.evaluation.statistics import (
    NUM_DRAWS,
    clustered_stderr,
    holm,
    is_exact_flip,
    mcnemar_p,
    permutation_p,
    sign_flip_sums,
    uncertainty,
)
from arc_ds.evaluation.task import Metric

if TYPE_CHECKING:
    from numpy.typing import NDArray


class _Pair(NamedTuple):
    """Two systems in one task, and their drawn differences."""

    ours: TaskStats
    theirs: TaskStats
    draws_R: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A system's score minus that of the first system, in points of 100 (nats per token for "nll").

    first: score of the first system.
    second: score of the other system.
    value: second - first.
    low, high: 95% interval of the difference (`statistics.uncertainty`); NaN for one cluster.
    n: number of questions.
    num_clusters: number of clusters.
    stderr: standard error of the difference.
    detectable: smallest difference that is found in 80% of experiments of this size: 2.8 standard errors, more for few
        clusters or seeds; NaN if both systems have equal scores in all draws.
    p: two-sided p-value.
    test: "mcnemar" or "sign-flip"; "welch" if the interval includes the spread of seeds; "bootstrap" for an
        average over tasks, which has no p-value.
    p_holm: the p-value, adjusted over tasks; None for metrics that are not the headline.
    """

    first: float
    second: float
    value: float
    low: float
    high: float
    n: int
    num_clusters: int
    stderr: float
    detectable: float
    p: float | None
    test: str
    p_holm: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All differences of two systems.

    first: name of the first system.
    second: name of the other system.
    by_task: differences by task and metric; the first metric of a task is its headline.
    average: difference of the means of the headline scores; None for one task.
    """

    first: str
    second: str
    by_task: Mapping[str, Mapping[Metric, Difference]]
    average: Difference | None


def compare_systems(first: SystemResults, *others: SystemResults, num_draws: int = NUM_DRAWS) -> list[Comparison]:
    """Compare systems with the first one. Raises DataError, with the difference, if their data or protocols differ."""
    for other in others:
        check_comparable(first, other)
    systems = with_clusters(first, *others)
    lowercase = is_bleu_lowercase(*systems)
    ours, *all_theirs = (score_system(each, num_draws, bleu_lowercase=lowercase) for each in systems)
    return [compare_scores(ours, theirs) for theirs in all_theirs]


def compare_scores(ours: SystemScores, theirs: SystemScores) -> Comparison:
    """Compare two systems in the tasks that both have, on the same questions and clusters in the same order."""
    found: dict[str, dict[Metric, Difference]] = {}
    pairs: list[_Pair] = []
    for task, stats in ours.stats.items():
        if task not in theirs.stats:
            continue
        first, second = ours.draws[task], theirs.draws[task]
        draws = {metric: second[metric] - first[metric] for metric in first if metric in second}
        found[task] = {metric: _difference(stats, theirs.stats[task], metric, each) for metric, each in draws.items()}
        pairs.append(_Pair(stats, theirs.stats[task], draws[stats.headline]))
    headlines = [next(iter(metrics.values())) for metrics in found.values()]
    adjusted = dict(zip(found, holm([each.p or 0.0 for each in headlines]), strict=True))
    for task, p_holm in adjusted.items():
        metric = ours.stats[task].headline
        found[task][metric] = replace(found[task][metric], p_holm=p_holm)
    average = _average(pairs) if len(found) > 1 else None
    return Comparison(first=ours.name, second=theirs.name, by_task=found, average=average)


def check_comparable(first: SystemResults, second: SystemResults) -> None:
    """Raise DataError, with the difference, unless two systems have the same questions, data and protocol.

    Digests and protocols count if both sides state them: answers of other programs have none.
    """
    for one, other in ((first.seeds[0], each) for each in (*first.seeds[1:], *second.seeds)):
        names = f"{one.path} and {other.path} cannot be compared"
        if differences := _protocol_differences(one, other):
            raise DataError(
                f"{names}: their protocols differ in {'; '.join(differences)}. Evaluate both with the same protocol."
            )
        check_same_questions(one, other, by_task(one.predictions), by_task(other.predictions))
        for task, (ours, theirs) in _digests(one, other).items():
            if ours and theirs and ours != theirs:
                raise DataError(
                    f"{names}: their data digests of task {task!r} are {ours} and {theirs}. Evaluate both on the same "
                    "files."
                )


def _digests(*files: ResultFile) -> dict[str, list[str | None]]:
    """The data digest of each file by task; None if a file states none. A digest of all tasks is that of each."""
    found = [file.run.get("data_digest") for file in files]
    tasks = sorted({each.task for each in files[0].predictions})
    return {task: [each.get(task) if isinstance(each, Mapping) else each for each in found] for task in tasks}


def _protocol_differences(one: ResultFile, other: ResultFile) -> list[str]:
    """The fields in which two protocols differ, other than their name."""
    ours, theirs = one.protocol, other.protocol
    if not ours or not theirs:
        return []
    fields = sorted({*ours, *theirs} - {"name"})
    return [
        f"{field} ({ours.get(field)!r} and {theirs.get(field)!r})"
        for field in fields
        if ours.get(field) != theirs.get(field)
    ]


def _difference(ours: TaskStats, theirs: TaskStats, metric: Metric, draws_R: NDArray[np.float64]) -> Difference:
    """The difference of two systems in one metric. draws_R: drawn differences."""
    seeds = seed_scores(ours, metric), seed_scores(theirs, metric)
    first, second = (float(each.mean()) for each in seeds)
    low, high = bounds_of(metric)
    stderr = None
    if is_mean(metric):
        stderr = clustered_stderr(influence(theirs, metric) - influence(ours, metric), ours.clusters_N)
    found = uncertainty(
        second - first,
        [(draws_R, ours.num_clusters)],
        seeds=seeds,
        stderr=stderr,
        bounds=(low - high, high - low),
    )
    p, test = _test(ours, theirs, metric) if found.p is None else (found.p, "welch")
    return Difference(
        first=first,
        second=second,
        value=second - first,
        n=len(ours.clusters_N),
        num_clusters=ours.num_clusters,
        test=test,
        **found._replace(p=p)._asdict(),
    )


def _test(ours: TaskStats, theirs: TaskStats, metric: Metric) -> tuple[float, str]:
    """The p-value of a difference and the name of its test."""
    first, second = ours.by_metric[metric], theirs.by_metric[metric]
    is_single = ours.num_clusters == len(ours.clusters_N) and ours.num_groups == len(first) == len(second) == 1
    if metric == "em" and is_single and np.isin([first[..., 0], second[..., 0]], (0, 1)).all():
        first_right, second_right = first[0, :, 0] > 0, second[0, :, 0] > 0
        return mcnemar_p(int((first_right & ~second_right).sum()), int((second_right & ~first_right).sum())), "mcnemar"
    return _sign_flip_p(ours, theirs, metric), "sign-flip"


def _sign_flip_p(ours: TaskStats, theirs: TaskStats, metric: Metric) -> float:
    """The p-value of a permutation test that exchanges both systems' answers to whole clusters."""
    first_CGK, second_CGK = (cluster_sums(stats, metric).mean(axis=2) for stats in (ours, theirs))
    half_CGK = (second_CGK - first_CGK) / 2
    middle_GK = (first_CGK + second_CGK).sum(axis=0) / 2

    def scores_of_difference(shift: NDArray[np.float64]) -> NDArray[np.float64]:
        shift_GK = shift.reshape(len(shift), *middle_GK.shape)
        better, worse = (mean_of_groups(metric, (middle_GK + sign * shift_GK)[:, :, None])[:, 0] for sign in (1, -1))
        return better - worse

    columns = half_CGK.reshape(len(half_CGK), -1)
    observed = float(scores_of_difference(columns.sum(axis=0, keepdims=True))[0])
    draws_R = scores_of_difference(sign_flip_sums(columns, ours.task))
    return permutation_p(observed, draws_R, is_exact=is_exact_flip(ours.num_clusters))


def _average(pairs: Sequence[_Pair]) -> Difference:
    """The mean of the differences in headline metrics."""
    seeds = (
        np.mean([seed_scores(each.ours, each.ours.headline) for each in pairs], axis=0),
        np.mean([seed_scores(each.theirs, each.ours.headline) for each in pairs], axis=0),
    )
    first, second = (float(each.mean()) for each in seeds)
    return Difference(
        first=first,
        second=second,
        value=second - first,
        n=sum(len(each.ours.clusters_N) for each in pairs),
        num_clusters=sum(each.ours.num_clusters for each in pairs),
        test="bootstrap",
        **uncertainty(second - first, [(each.draws_R, each.ours.num_clusters) for each in pairs], seeds=seeds)
        ._replace(p=None)
        ._asdict(),
    )

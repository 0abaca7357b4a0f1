"""Paired comparison of two systems on the same questions.

Both systems see the same drawn clusters, so the interval is that of the paired difference. Tests: exact McNemar for
exact match of single samples; otherwise signs of whole clusters are flipped, which exchanges both systems' answers to
them. P-values of the headline metrics are adjusted for the number of tasks by Holm's method.

Intervals of three or more training seeds include the spread of seeds. Tests take the mean over seeds of each answer's
statistics: they are tests on questions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from arc_ds.errors import DataError
from arc_ds.evaluation.metrics import is_mean
from arc_ds.evaluation.results import ResultFile, SystemResults
from arc_ds.evaluation.scoring import (
    TaskStats,
    by_task,
    check_same_questions,
    cluster_sums,
    influence,
    is_bleu_lowercase,
    mean_of_groups,
    score_draws,
    seed_scores,
    stderr_of,
    system_stats,
)
from arc_ds.evaluation.statistics import (
    DETECTABLE,
    NUM_DRAWS,
    holm,
    is_exact_flip,
    mcnemar_p,
    percentile_interval,
    permutation_p,
    sign_flip_sums,
)
from arc_ds.evaluation.task import Metric

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A system's score minus that of the first system, in points of 100 (nats per token for "nll").

    first: score of the first system.
    second: score of the other system.
    value: second - first.
    low, high: 95% interval of the difference, by bootstrap over clusters; NaN for one cluster.
    n: number of samples.
    num_clusters: number of clusters.
    stderr: standard error of the difference.
    detectable: smallest difference that is found in 80% of experiments of this size, 2.8 standard errors.
    p: two-sided p-value.
    test: "mcnemar" or "sign-flip"; "bootstrap" for an average over tasks, which has no p-value.
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


def compare_systems(first: SystemResults, second: SystemResults, num_draws: int = NUM_DRAWS) -> Comparison:
    """Compare two systems. Raises DataError, with the difference, if their data or protocols differ."""
    check_comparable(first, second)
    lowercase = is_bleu_lowercase(first, second)
    ours, theirs = (system_stats(each, bleu_lowercase=lowercase) for each in with_clusters(first, second))
    # "first" and "second" draw their seeds apart: the seeds of two systems are not paired.
    our_draws = {task: score_draws(each, num_draws, seeds_key="first") for task, each in ours.items()}
    their_draws = {task: score_draws(each, num_draws, seeds_key="second") for task, each in theirs.items()}
    return compare_stats(first.name, second.name, ours, theirs, our_draws, their_draws)


def compare_stats(
    first: str,
    second: str,
    ours: Mapping[str, TaskStats],
    theirs: Mapping[str, TaskStats],
    our_draws: Mapping[str, Mapping[Metric, NDArray[np.float64]]],
    their_draws: Mapping[str, Mapping[Metric, NDArray[np.float64]]],
) -> Comparison:
    """Compare two systems in the tasks that both have.

    first, second: their names.
    ours, theirs: statistics by task, of the same questions and clusters in the same order.
    our_draws, their_draws: `score_draws` by task.
    """
    found: dict[str, dict[Metric, Difference]] = {}
    headline_draws = []
    for task in (task for task in ours if task in theirs):
        draws = {m: their_draws[task][m] - our_draws[task][m] for m in our_draws[task] if m in their_draws[task]}
        found[task] = {metric: _difference(ours[task], theirs[task], metric, each) for metric, each in draws.items()}
        headline_draws.append(draws[ours[task].headline])
    headlines = [next(iter(metrics.values())) for metrics in found.values()]
    adjusted = dict(zip(found, holm([each.p or 0.0 for each in headlines]), strict=True))
    for task, p_holm in adjusted.items():
        metric = ours[task].headline
        found[task][metric] = replace(found[task][metric], p_holm=p_holm)
    average = _average(headlines, headline_draws) if len(found) > 1 else None
    return Comparison(first=first, second=second, by_task=found, average=average)


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


def with_clusters(*systems: SystemResults) -> list[SystemResults]:
    """The systems with the clusters and groups of the first file that states them; others may have none."""
    files = [file for system in systems for file in system.seeds]
    known = {
        (each.task, each.id): (each.cluster, each.group)
        for file in reversed(files)
        for each in file.predictions
        if each.cluster or each.group
    }

    def completed(file: ResultFile) -> ResultFile:
        pairs = [(each, *known.get((each.task, each.id), ("", ""))) for each in file.predictions]
        return replace(file, predictions=tuple(replace(each, cluster=c, group=g) for each, c, g in pairs))

    return [replace(system, seeds=tuple(map(completed, system.seeds))) for system in systems]


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
    first, second = float(seed_scores(ours, metric).mean()), float(seed_scores(theirs, metric).mean())
    has_few_seeds = max(len(ours.by_metric[metric]), len(theirs.by_metric[metric])) < 3
    is_closed_form = is_mean(metric) and has_few_seeds
    stderr = stderr_of(ours, influence(theirs, metric) - influence(ours, metric) if is_closed_form else None, draws_R)
    low, high = percentile_interval(draws_R, ours.num_clusters)
    p, test = _test(ours, theirs, metric)
    return Difference(
        first=first,
        second=second,
        value=second - first,
        low=low,
        high=high,
        n=len(ours.clusters_N),
        num_clusters=ours.num_clusters,
        stderr=stderr,
        detectable=DETECTABLE * stderr,
        p=p,
        test=test,
    )


def _test(ours: TaskStats, theirs: TaskStats, metric: Metric) -> tuple[float, str]:
    """The p-value of a difference and the name of its test."""
    first, second = ours.by_metric[metric], theirs.by_metric[metric]
    is_single = ours.num_clusters == len(ours.clusters_N) and ours.num_groups == len(first) == len(second) == 1
    if metric == "em" and is_single:
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


def _average(headlines: list[Difference], draws: list[NDArray[np.float64]]) -> Difference:
    draws_R = np.mean(draws, axis=0)
    low, high = percentile_interval(draws_R, min(each.num_clusters for each in headlines))
    stderr = float(draws_R.std(ddof=1))
    return Difference(
        first=float(np.mean([each.first for each in headlines])),
        second=float(np.mean([each.second for each in headlines])),
        value=float(np.mean([each.value for each in headlines])),
        low=low,
        high=high,
        n=sum(each.n for each in headlines),
        num_clusters=sum(each.num_clusters for each in headlines),
        stderr=stderr,
        detectable=DETECTABLE * stderr,
        p=None,
        test="bootstrap",
    )

"""Scores of result files with intervals.

`task_stats` turns answers into statistics (`metrics.py`), `draw_sums` sums them over drawn clusters (`statistics.py`),
and `score_systems` makes scores of both. The score of a task with groups, such as directions of translation, is the
mean of its groups' scores: all groups see the same drawn clusters. With several training seeds it is the mean over
seeds.

Shapes: N samples, C clusters, G groups, S training seeds, K statistics of a metric, R draws.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from arc_ds.errors import DataError
from arc_ds.evaluation.metrics import Answer, is_mean, metrics_of, sample_stats, score_of
from arc_ds.evaluation.results import Prediction, ResultFile, SystemResults
from arc_ds.evaluation.statistics import NUM_DRAWS, bootstrap_sums, clustered_stderr, percentile_interval, seed_weights
from arc_ds.evaluation.task import Metric

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAX_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStats:
    """The statistics of all answers of one system to one task, sorted by id.

    task: its name.
    clusters_N: index of each sample's cluster, in the sorted order of their names.
    groups_N: index of each sample's group, likewise.
    by_metric: [S, N, K] for each metric; the first one is the headline.
    num_empty: empty answers.
    """

    task: str
    clusters_N: NDArray[np.intp]
    groups_N: NDArray[np.intp]
    by_metric: Mapping[Metric, NDArray[np.float64]]
    num_empty: int

    @property
    def headline(self) -> Metric:
        """The metric of averages over tasks."""
        return next(iter(self.by_metric))

    @property
    def num_clusters(self) -> int:
        """C."""
        return int(self.clusters_N.max()) + 1

    @property
    def num_groups(self) -> int:
        """G."""
        return int(self.groups_N.max()) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A score with its uncertainty, in points of 100 (nats per token for "nll").

    value: the score.
    low, high: 95% interval, by bootstrap over clusters; NaN for one cluster.
    n: number of samples.
    num_clusters: number of clusters.
    stderr: clustered standard error: in closed form for means with fewer than three seeds, else of the bootstrap.
    seed_sd: standard deviation over training seeds; None for one seed.
    """

    value: float
    low: float
    high: float
    n: int
    num_clusters: int
    stderr: float
    seed_sd: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemScores:
    """All scores of one system.

    name: name of the system.
    by_task: scores by task and metric; the first metric of a task is its headline.
    average: mean of the tasks' headline scores, by drawing within tasks; None for one task.
    num_empty: empty answers, by task.
    """

    name: str
    by_task: Mapping[str, Mapping[Metric, Score]]
    average: Score | None
    num_empty: Mapping[str, int]


def score_system(system: SystemResults, num_draws: int = NUM_DRAWS) -> SystemScores:
    """Score all answers of a system. Raises DataError if its training seeds answer different questions."""
    tasks = system_stats(system)
    scores: dict[str, dict[Metric, Score]] = {}
    headlines = []
    for task, stats in tasks.items():
        draws = score_draws(stats, num_draws)
        scores[task] = {metric: score_of_task(stats, metric, draws[metric]) for metric in stats.by_metric}
        headlines.append((scores[task][stats.headline], draws[stats.headline]))
    return SystemScores(
        name=system.name,
        by_task=scores,
        average=average_of(headlines) if len(tasks) > 1 else None,
        num_empty={task: stats.num_empty for task, stats in tasks.items()},
    )


def average_of(scores: Sequence[tuple[Score, NDArray[np.float64]]]) -> Score:
    """The mean of the scores of several tasks, each with its draws [R]."""
    draws_R = np.mean([draws for _, draws in scores], axis=0)
    low, high = percentile_interval(draws_R, min(score.num_clusters for score, _ in scores))
    return Score(
        value=float(np.mean([score.value for score, _ in scores])),
        low=low,
        high=high,
        n=sum(score.n for score, _ in scores),
        num_clusters=sum(score.num_clusters for score, _ in scores),
        stderr=float(draws_R.std(ddof=1)),
    )


def system_stats(system: SystemResults, *, bleu_lowercase: bool | None = None) -> dict[str, TaskStats]:
    """The statistics of a system, by task. Raises DataError if its training seeds answer different questions.

    bleu_lowercase: case of "bleu"; None: that of the system's protocol, or with case if the protocol is unknown.
    """
    by_seed = [by_task(file.predictions) for file in system.seeds]
    for file, tasks in zip(system.seeds[1:], by_seed[1:], strict=True):
        check_same_questions(system.seeds[0], file, by_seed[0], tasks)
    total = sum(len(file.predictions) for file in system.seeds)
    with tqdm(total=total, desc=f"scoring {system.name}", unit=" answers", disable=None, leave=False) as progress:
        if bleu_lowercase is None:
            bleu_lowercase = is_bleu_lowercase(system)
        return {
            task: task_stats([seed[task] for seed in by_seed], bleu_lowercase=bleu_lowercase, progress=progress)
            for task in by_seed[0]
        }


def is_bleu_lowercase(*systems: SystemResults) -> bool:
    """Whether a protocol of these systems has lowercase BLEU as its headline."""
    return any(file.protocol.get("bleu_lowercase", False) for system in systems for file in system.seeds)


def by_task(predictions: Iterable[Prediction]) -> dict[str, list[Prediction]]:
    """Predictions by task, sorted by id."""
    tasks: dict[str, list[Prediction]] = {}
    for prediction in sorted(predictions, key=lambda each: each.id):
        tasks.setdefault(prediction.task, []).append(prediction)
    return dict(sorted(tasks.items()))


def check_same_questions(
    first: ResultFile,
    second: ResultFile,
    first_tasks: Mapping[str, Sequence[Prediction]],
    second_tasks: Mapping[str, Sequence[Prediction]],
) -> None:
    """Raise DataError, with the difference, unless two files have the same tasks, ids, references, clusters and groups.

    A cluster or group that one file leaves out is no difference.
    """
    names = f"{first.path} and {second.path}"
    if first_tasks.keys() != second_tasks.keys():
        raise DataError(
            f"{names} cannot be compared: they have the tasks {', '.join(first_tasks)} and {', '.join(second_tasks)}. "
            "Name common tasks with --tasks."
        )
    for task, ours in first_tasks.items():
        theirs = second_tasks[task]
        ids, other_ids = {each.id for each in ours}, {each.id for each in theirs}
        if ids != other_ids:
            raise DataError(
                f"{names} cannot be compared: of task {task!r}, {_some(ids - other_ids)} only in the first one and "
                f"{_some(other_ids - ids)} only in the second one. Evaluate both on the same questions."
            )
        for one, other in zip(ours, theirs, strict=True):
            for field in ("references", "cluster", "group"):
                a, b = getattr(one, field), getattr(other, field)
                if a and b and a != b:
                    raise DataError(
                        f"{names} cannot be compared: id {one.id!r} of task {task!r} has {field} {_shown(a)} in the "
                        f"first one and {_shown(b)} in the second one. Evaluate both on the same data."
                    )


def _some(ids: set[str]) -> str:
    """A number of ids and the first ones."""
    named = ", ".join(sorted(ids)[:_MAX_NAMED])
    more = ", …" if len(ids) > _MAX_NAMED else ""
    return f"{len(ids)} ids are" + (f" ({named}{more})" if ids else "")


def _shown(value: object) -> str:
    text = str(list(value) if isinstance(value, tuple) else repr(value))
    return text if len(text) <= 80 else f"{text[:79]}…"


def task_stats(
    seeds: Sequence[Sequence[Prediction]], *, bleu_lowercase: bool, progress: tqdm | None = None
) -> TaskStats:
    """The statistics of one task.

    seeds: the predictions of each training seed, in the same order of ids.
    bleu_lowercase: case of "bleu" (`Protocol.bleu_lowercase`).
    progress: a bar that counts answers.
    """
    task = seeds[0][0].task
    metrics = metrics_of(task)
    if all(each.nll is not None for predictions in seeds for each in predictions):
        metrics = (*metrics, "nll")
    rows: dict[Metric, list[list[tuple[float, ...]]]] = {metric: [[] for _ in seeds] for metric in metrics}
    for seed, predictions in enumerate(seeds):
        for each in predictions:
            answer = Answer(each.task, each.prediction, each.references, each.nll)
            for metric in metrics:
                rows[metric][seed].append(sample_stats(metric, answer, bleu_lowercase=bleu_lowercase))
            if progress is not None:
                progress.update()
    return TaskStats(
        task=task,
        clusters_N=np.unique([each.cluster or each.id for each in seeds[0]], return_inverse=True)[1],
        groups_N=np.unique([each.group for each in seeds[0]], return_inverse=True)[1],
        by_metric={metric: np.array(stats, dtype=np.float64) for metric, stats in rows.items()},
        num_empty=sum(not each.prediction.strip() for predictions in seeds for each in predictions),
    )


def cluster_sums(stats: TaskStats, metric: Metric) -> NDArray[np.float64]:
    """Statistics of a metric, summed over the samples of each cluster, [C, G, S, K]."""
    samples_SNK = stats.by_metric[metric]
    num_seeds, _, num_stats = samples_SNK.shape
    sums = np.zeros((stats.num_clusters, stats.num_groups, num_seeds, num_stats))
    np.add.at(sums, (stats.clusters_N, stats.groups_N), samples_SNK.swapaxes(0, 1))
    return sums


def mean_of_groups(metric: Metric, sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores of sums of statistics, [..., G, S, K] to [..., S]. Groups without samples are left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # no group has samples: the score is NaN
        return np.nanmean(score_of(metric, sums), axis=-2)


def score_draws(
    stats: TaskStats, num_draws: int = NUM_DRAWS, *, seeds_key: str = ""
) -> dict[Metric, NDArray[np.float64]]:
    """Scores of all metrics over drawn clusters, and drawn seeds if there are three or more, [R] each.

    Systems with the same clusters see the same draws, which depend on the task's name.

    seeds_key: name of the draws of seeds. It is the same for all tasks of a system: a seed is drawn with all of them.
    """
    sums = {metric: cluster_sums(stats, metric) for metric in stats.by_metric}
    columns = np.concatenate([each.reshape(len(each), -1) for each in sums.values()], axis=1)
    drawn = bootstrap_sums(columns, stats.task, num_draws)
    draws, first = {}, 0
    for metric, each in sums.items():
        last = first + each[0].size
        scores_RS = mean_of_groups(metric, drawn[:, first:last].reshape(num_draws, *each.shape[1:]))
        draws[metric] = (scores_RS * seed_weights(scores_RS.shape[1], seeds_key, num_draws)).sum(axis=1)
        first = last
    return draws


def seed_scores(stats: TaskStats, metric: Metric) -> NDArray[np.float64]:
    """The score of each training seed, [S]."""
    return mean_of_groups(metric, cluster_sums(stats, metric).sum(axis=0))


def influence(stats: TaskStats, metric: Metric) -> NDArray[np.float64]:
    """The contribution of each sample to the error of a mean metric, [N], averaged over seeds. Their sum is 0."""
    samples_SNK = stats.by_metric[metric]
    totals_GSK = cluster_sums(stats, metric).sum(axis=0)
    means_GS = score_of(metric, totals_GSK)
    scale = float(score_of(metric, np.ones(samples_SNK.shape[2])))  # points of a statistic of 1
    deviations_NS = (scale * samples_SNK[..., 0].T - means_GS[stats.groups_N] * samples_SNK[..., 1].T) / totals_GSK[
        stats.groups_N
    ][..., 1]
    return deviations_NS.mean(axis=1) / stats.num_groups


def score_of_task(stats: TaskStats, metric: Metric, draws_R: NDArray[np.float64]) -> Score:
    """The score of one metric, with the interval of its draws."""
    seeds_S = seed_scores(stats, metric)
    low, high = percentile_interval(draws_R, stats.num_clusters)
    return Score(
        value=float(seeds_S.mean()),
        low=low,
        high=high,
        n=len(stats.clusters_N),
        num_clusters=stats.num_clusters,
        stderr=stderr_of(stats, influence(stats, metric) if is_mean(metric) and len(seeds_S) < 3 else None, draws_R),
        seed_sd=float(seeds_S.std(ddof=1)) if len(seeds_S) > 1 else None,
    )


def stderr_of(stats: TaskStats, influence_N: NDArray[np.float64] | None, draws_R: NDArray[np.float64]) -> float:
    """The clustered standard error: in closed form from influences, or else of the draws; NaN for one cluster."""
    if stats.num_clusters < 2:
        return float("nan")
    if influence_N is None:
        return float(draws_R.std(ddof=1))
    return clustered_stderr(influence_N, stats.clusters_N)

"""Scores of result files with intervals.

`task_stats` turns answers into statistics (`metrics.py`), `score_draws` sums them over drawn clusters, and
`score_system` makes scores of both. The score of a task with groups, such as directions of translation, is the
mean of its groups' scores: all groups see the same drawn clusters. With several training seeds it is the mean over
seeds. Sampled answers to one question differ in the field `seed` of their lines; their statistics are averaged first.

Shapes: N questions, C clusters, G groups, S training seeds, K statistics of a metric, R draws.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from arc_ds.errors import DataError
from arc_ds.evaluation.metrics import Answer, bounds_of, is_mean, metrics_of, sample_stats, score_of
from arc_ds.evaluation.results import Prediction, ResultFile, SystemResults
from arc_ds.evaluation.statistics import NUM_DRAWS, bootstrap_sums, clustered_stderr, uncertainty
from arc_ds.evaluation.task import Metric

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAX_NAMED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStats:
    """The statistics of all answers of one system to one task, sorted by id.

    task: its name.
    clusters_N: index of each question's cluster, in the sorted order of their names.
    groups_N: index of each question's group, in the sorted order of their names.
    by_metric: [S, N, K] for each metric, means over a question's sampled answers; the first one is the headline.
    num_empty: empty answers.
    num_blank: answers with a reference without text.
    """

    task: str
    clusters_N: NDArray[np.intp]
    groups_N: NDArray[np.intp]
    by_metric: Mapping[Metric, NDArray[np.float64]]
    num_empty: int
    num_blank: int

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
    low, high: 95% interval (`statistics.uncertainty`); NaN for one cluster. If all answers score 0, or all score 100,
        it is the exact one of as many independent answers as there are clusters (Clopper and Pearson).
    n: number of questions.
    num_clusters: number of clusters.
    stderr: clustered standard error: in closed form for means, else of the bootstrap. It includes the spread of three
        or more training seeds.
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
    """All scores of one system. Mappings are by task.

    results: its result files.
    stats: the statistics of its answers.
    draws: bootstrap draws [R] of the scores, by metric.
    by_task: scores by metric; the first metric of a task is its headline.
    average: mean of the tasks' headline scores, by drawing within tasks; None for one task.
    """

    results: SystemResults
    stats: Mapping[str, TaskStats]
    draws: Mapping[str, Mapping[Metric, NDArray[np.float64]]]
    by_task: Mapping[str, Mapping[Metric, Score]]
    average: Score | None

    @property
    def name(self) -> str:
        """Its name, unique among the systems that were read together."""
        return self.results.name


def score_system(
    system: SystemResults, num_draws: int = NUM_DRAWS, *, bleu_lowercase: bool | None = None
) -> SystemScores:
    """Score all answers of a system. The arguments and errors are those of `system_stats`."""
    return score_stats(system, system_stats(system, bleu_lowercase=bleu_lowercase), num_draws)


def score_stats(system: SystemResults, stats: Mapping[str, TaskStats], num_draws: int = NUM_DRAWS) -> SystemScores:
    """The scores of a system's statistics, in the order of their tasks."""
    draws = {task: score_draws(each, num_draws) for task, each in stats.items()}
    return SystemScores(
        results=system,
        stats=stats,
        draws=draws,
        by_task={
            task: {metric: _score_of_task(each, metric, draws[task][metric]) for metric in each.by_metric}
            for task, each in stats.items()
        },
        average=_average([(each, draws[task][each.headline]) for task, each in stats.items()]),
    )


def _average(tasks: Sequence[tuple[TaskStats, NDArray[np.float64]]]) -> Score | None:
    """The mean of the headline scores of several tasks, each with its draws [R]; None for one task."""
    if len(tasks) < 2:
        return None
    seeds_S = np.mean([seed_scores(stats, stats.headline) for stats, _ in tasks], axis=0)
    low, high = np.mean([bounds_of(stats.headline) for stats, _ in tasks], axis=0)
    found = uncertainty(
        float(seeds_S.mean()),
        [(draws, stats.num_clusters) for stats, draws in tasks],
        seeds=[seeds_S],
        bounds=(float(low), float(high)),
    )
    return Score(
        value=float(seeds_S.mean()),
        low=found.low,
        high=found.high,
        n=sum(len(stats.clusters_N) for stats, _ in tasks),
        num_clusters=sum(stats.num_clusters for stats, _ in tasks),
        stderr=found.stderr,
        seed_sd=_seed_sd(seeds_S),
    )


def _seed_sd(seeds_S: NDArray[np.float64]) -> float | None:
    return float(seeds_S.std(ddof=1)) if len(seeds_S) > 1 else None


def system_stats(system: SystemResults, *, bleu_lowercase: bool | None = None) -> dict[str, TaskStats]:
    """The statistics of a system, by task.

    bleu_lowercase: case of "bleu"; None: that of the system's protocol, or with case if the protocol is unknown.

    Raises DataError if its training seeds answer different questions, or if sampled answers to one question do not
    have the same references, cluster and group.
    """
    (system,) = with_clusters(system)
    by_seed = [by_task(file.predictions) for file in system.seeds]
    for file, tasks in zip(system.seeds, by_seed, strict=True):
        _check_sampled_answers(file, tasks)
        if file is not system.seeds[0]:
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


def with_clusters(*systems: SystemResults) -> list[SystemResults]:
    """The systems with all clusters and groups that one of their files states.

    Raises DataError if two files state different ones for one question.
    """
    files = [file for system in systems for file in system.seeds]
    known: dict[tuple[str, str], tuple[str, str]] = {}
    for path, each in ((file.path, each) for file in files for each in file.predictions):
        cluster, group = known.get((each.task, each.id), ("", ""))
        found = cluster or each.cluster, group or each.group
        if found != (each.cluster or cluster, each.group or group):
            raise DataError(
                f"{path}: id {each.id!r} of task {each.task!r} has cluster {each.cluster!r} and group {each.group!r}; "
                f"another answer to it has {cluster!r} and {group!r}. Evaluate all on the same data."
            )
        known[each.task, each.id] = found

    def completed(each: Prediction) -> Prediction:
        cluster, group = known.get((each.task, each.id), ("", ""))
        if (cluster and not each.cluster) or (group and not each.group):
            return replace(each, cluster=each.cluster or cluster, group=each.group or group)
        return each

    def completed_file(file: ResultFile) -> ResultFile:
        return replace(file, predictions=tuple(map(completed, file.predictions)))

    return [replace(system, seeds=tuple(map(completed_file, system.seeds))) for system in systems]


def by_task(predictions: Iterable[Prediction]) -> dict[str, list[Prediction]]:
    """Predictions by task, sorted by id and then by `seed`."""
    tasks: dict[str, list[Prediction]] = {}
    for prediction in sorted(predictions, key=lambda each: (each.id, each.seed)):
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
    for task, answers in first_tasks.items():
        ours, theirs = ({each.id: each for each in found} for found in (answers, second_tasks[task]))
        if ours.keys() != theirs.keys():
            raise DataError(
                f"{names} cannot be compared: of task {task!r}, {_some(ours.keys() - theirs.keys())} only in the first "
                f"one and {_some(theirs.keys() - ours.keys())} only in the second one. Evaluate both on the same "
                "questions."
            )
        for name, one in ours.items():
            if (difference := _difference(one, theirs[name])) is not None:
                field, a, b = difference
                raise DataError(
                    f"{names} cannot be compared: id {name!r} of task {task!r} has {field} {a} in the first one and "
                    f"{b} in the second one. Evaluate both on the same data."
                )


def _check_sampled_answers(file: ResultFile, tasks: Mapping[str, Sequence[Prediction]]) -> None:
    """Raise DataError unless all answers to a question have the same references, cluster and group."""
    for task, answers in tasks.items():
        for one, other in pairwise(answers):
            if one.id == other.id and (difference := _difference(one, other)) is not None:
                field, a, b = difference
                raise DataError(
                    f"{file.path}: the answers to id {one.id!r} of task {task!r} have {field} {a} and {b}. Sampled "
                    "answers to one question need the same; give other questions another id."
                )


def _difference(one: Prediction, other: Prediction) -> tuple[str, str, str] | None:
    """The field in which two questions differ, with both values. None if they are equal."""
    for field in ("references", "cluster", "group"):
        a, b = getattr(one, field), getattr(other, field)
        if a and b and a != b:
            return field, _shown(a), _shown(b)
    return None


def _some(ids: Set[str]) -> str:
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

    seeds: the predictions of each training seed to the same questions, sorted by id.
    bleu_lowercase: case of "bleu" (`Protocol.bleu_lowercase`).
    progress: a bar that counts answers.
    """
    task = seeds[0][0].task
    metrics = metrics_of(task)
    if all(each.nll is not None for predictions in seeds for each in predictions):
        metrics = (*metrics, "nll")
    by_seed = [_question_stats(answers, metrics, bleu_lowercase, progress) for answers in seeds]
    questions = [seeds[0][place] for place in _first_answers(seeds[0])]
    return TaskStats(
        task=task,
        clusters_N=_indices([f"c{each.cluster}" if each.cluster else f"i{each.id}" for each in questions]),
        groups_N=_indices([each.group for each in questions]),
        by_metric={metric: np.stack([stats[metric] for stats in by_seed]) for metric in metrics},
        num_empty=sum(not each.prediction.strip() for predictions in seeds for each in predictions),
        num_blank=sum(not all(map(str.strip, each.references)) for predictions in seeds for each in predictions),
    )


def _question_stats(
    answers: Sequence[Prediction], metrics: Sequence[Metric], bleu_lowercase: bool, progress: tqdm | None
) -> dict[Metric, NDArray[np.float64]]:
    """The mean statistics of the answers to each question, [N, K] for each metric."""
    stats: dict[Metric, NDArray[np.float64]] = {}
    for place, each in enumerate(answers):
        answer = Answer(each.task, each.prediction, each.references, each.nll)
        for metric in metrics:
            row = sample_stats(metric, answer, bleu_lowercase=bleu_lowercase)
            if place == 0:
                stats[metric] = np.empty((len(answers), len(row)))
            stats[metric][place] = row
        if progress is not None:
            progress.update()
    firsts_N = _first_answers(answers)
    num_answers_N = np.diff([*firsts_N, len(answers)])[:, None]
    return {metric: np.add.reduceat(rows, firsts_N) / num_answers_N for metric, rows in stats.items()}


def _first_answers(answers: Sequence[Prediction]) -> list[int]:
    """The place of the first answer to each question."""
    return [place for place, each in enumerate(answers) if place == 0 or each.id != answers[place - 1].id]


def _indices(names: Sequence[str]) -> NDArray[np.intp]:
    """The place of each name among the sorted ones."""
    places = {name: place for place, name in enumerate(sorted(set(names)))}
    return np.array([places[name] for name in names], dtype=np.intp)


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


def score_draws(stats: TaskStats, num_draws: int = NUM_DRAWS) -> dict[Metric, NDArray[np.float64]]:
    """Scores of all metrics over drawn clusters, means over training seeds, [R] each.

    Systems with the same clusters see the same draws, which depend on the task's name.
    """
    sums = {metric: cluster_sums(stats, metric) for metric in stats.by_metric}
    columns = np.concatenate([each.reshape(len(each), -1) for each in sums.values()], axis=1)
    drawn = bootstrap_sums(columns, stats.task, num_draws)
    draws, first = {}, 0
    for metric, each in sums.items():
        last = first + each[0].size
        draws[metric] = mean_of_groups(metric, drawn[:, first:last].reshape(num_draws, *each.shape[1:])).mean(axis=1)
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


def _score_of_task(stats: TaskStats, metric: Metric, draws_R: NDArray[np.float64]) -> Score:
    """The score of one metric, with the interval of its draws."""
    seeds_S = seed_scores(stats, metric)
    value = float(seeds_S.mean())
    found = uncertainty(
        value,
        [(draws_R, stats.num_clusters)],
        seeds=[seeds_S],
        stderr=clustered_stderr(influence(stats, metric), stats.clusters_N) if is_mean(metric) else None,
        bounds=bounds_of(metric),
    )
    low, high = found.low, found.high
    if is_mean(metric) and metric != "nll" and low == high and value in (0, 100):
        reach = 100 * (1 - 0.025 ** (1 / stats.num_clusters))
        low, high = (0.0, reach) if value == 0 else (100 - reach, 100.0)
    return Score(
        value=value,
        low=low,
        high=high,
        n=len(stats.clusters_N),
        num_clusters=stats.num_clusters,
        stderr=found.stderr,
        seed_sd=_seed_sd(seeds_S),
    )

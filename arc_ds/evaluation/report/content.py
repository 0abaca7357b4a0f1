"""The content of a report: scores, compression ratios, comparisons with the baseline system, and differing samples."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from arc_ds.errors import ConfigError, DataError
from arc_ds.evaluation.comparison import Comparison, check_comparable, compare_scores
from arc_ds.evaluation.report.paper import in_paper_order
from arc_ds.evaluation.report.samples import DifferingSample, PairCounts, differing_samples
from arc_ds.evaluation.results import ResultFile, SystemResults, select_tasks
from arc_ds.evaluation.scoring import (
    SystemScores,
    TaskStats,
    is_bleu_lowercase,
    score_stats,
    seed_scores,
    system_stats,
    with_clusters,
)
from arc_ds.evaluation.statistics import NUM_DRAWS, uncertainty
from arc_ds.evaluation.task import Metric

_MAX_NOTE = 600
_BAR: dict[str, Any] = {"unit": "system", "disable": None, "leave": False}


class Sizes(NamedTuple):
    """Mean sizes of a system's prompts in a task. A size is None if the answers do not state the counts.

    ratio: compression ratio of documents, mean over samples (`Protocol.ratio`); infinite without documents.
    ratio_of_sums: the same, of the sums over samples.
    prompt_ratio: rows of the open-book prompts over rows of the prompts, both summed.
    prompt_rows: decoder rows of a prompt.
    new_tokens: tokens of an answer.
    """

    ratio: float | None
    ratio_of_sums: float | None
    prompt_ratio: float | None
    prompt_rows: float | None
    new_tokens: float | None


class GapClosed(NamedTuple):
    """The part of the gap between closed and open book that a system closes, with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that a report shows.

    systems: systems in the order of the arguments. The average is None unless a system has all tasks.
    sizes: mean sizes of a system's prompts, by its name and task.
    tasks: tasks in the order of the paper's tables.
    baseline: the system with which the others are compared.
    comparisons: comparison of each other system, by its name. Systems without a common task are left out.
    pair_counts: samples in which a system is better or worse than the baseline, by its name and task.
    samples: samples in which it differs from the baseline, a bounded number.
    gap_closed: by system and task, if there are answer NLLs and closed-book and open-book systems of the same decoder,
        on the same questions.
    different: names of systems whose questions, data or protocols differ from those of other systems.
    notes: sentences on limits of the comparison.
    """

    systems: tuple[SystemScores, ...]
    sizes: Mapping[tuple[str, str], Sizes]
    tasks: tuple[str, ...]
    baseline: str
    comparisons: Mapping[str, Comparison]
    pair_counts: Mapping[tuple[str, str], PairCounts]
    samples: tuple[DifferingSample, ...]
    gap_closed: Mapping[tuple[str, str], GapClosed]
    different: frozenset[str]
    notes: tuple[str, ...]

    def headline(self, task: str) -> Metric:
        """The metric of a task in tables and plots."""
        return next(system.stats[task].headline for system in self.systems if task in system.stats)

    def mean_size(self, system: SystemScores, field: str) -> float | None:
        """The mean of a field of `Sizes` over a system's tasks; None if one is unknown."""
        values = [getattr(self.sizes[system.name, task], field) for task in system.stats]
        return None if None in values else float(np.mean(values))


def make_report(
    systems: Sequence[SystemResults],
    *,
    baseline: str | None = None,
    metric: Metric | None = None,
    force: bool = False,
    max_samples: int = 300,
    num_draws: int = NUM_DRAWS,
) -> Report:
    """Compute a report.

    systems: the systems, as read by `read_systems`.
    baseline: name of the system with which the others are compared; None for the first one.
    metric: headline metric of all tasks; None for each task's own.
    force: compare systems of different data or protocols on their common questions. The report states the differences.
    max_samples: most samples that are shown.

    Raises ConfigError for an unknown baseline and for a metric that a task lacks, and DataError, with the difference,
    if two systems cannot be compared.
    """
    base_idx = _find(systems, baseline)
    notes = _check(systems, base_idx, force=force)
    lowercase = is_bleu_lowercase(*systems)
    different = {place for place, _ in notes}
    comparable = iter(with_clusters(*(each for place, each in enumerate(systems) if place not in different)))
    completed = [each if place in different else next(comparable) for place, each in enumerate(systems)]
    tasks = in_paper_order(set().union(*map(_tasks, systems)))
    made = [_scores(each, tasks, metric, lowercase, num_draws) for each in tqdm(completed, desc="scores", **_BAR)]
    base = made[base_idx]
    apart = [
        f"{each.name} has no task in common with {base.name}, so they are not compared."
        for each in made
        if not each.stats.keys() & base.stats.keys()
    ]
    comparisons, counts, samples = {}, {}, []
    for place, other in enumerate(tqdm(made, desc="differences", **_BAR)):
        common = [task for task in base.stats if task in other.stats]
        if place == base_idx or not common:
            continue
        ours, theirs = base, other
        if place in different:
            shared = _shared_answers(base.results, other.results, common)
            if shared is None:
                continue
            ours, theirs = (_scores(each, common, metric, lowercase, num_draws) for each in shared)
        comparisons[other.name] = compare_scores(ours, theirs)
        for task in comparisons[other.name].by_task:
            counts[other.name, task], found = differing_samples(
                ours.results, theirs.results, ours.stats[task], theirs.stats[task], max_samples
            )
            samples += found
    return Report(
        systems=tuple(made),
        sizes={(each.name, task): _task_sizes(each, task) for each in made for task in each.stats},
        tasks=tuple(tasks),
        baseline=base.name,
        comparisons=comparisons,
        pair_counts=counts,
        samples=tuple(_first_of_each(samples, max_samples)),
        gap_closed=_gaps_closed([each for place, each in enumerate(made) if place not in different]),
        different=frozenset(systems[place].name for place in different),
        notes=(*notes.values(), *apart),
    )


def _find(systems: Sequence[SystemResults], baseline: str | None) -> int:
    names = [system.name for system in systems]
    if baseline is not None and baseline not in names:
        raise ConfigError(f"no system is named {baseline!r}; the results have {', '.join(names)}. Correct --baseline.")
    return 0 if baseline is None else names.index(baseline)


def _check(systems: Sequence[SystemResults], base_idx: int, *, force: bool) -> dict[tuple[int, int], str]:
    """Why systems cannot be compared, by their places.

    In each task, a system is checked against the baseline, or against the first system that has it if the baseline
    does not. Raises DataError unless `force` is set.
    """
    first_of: dict[str, int] = {}
    notes = {}
    for place in sorted(range(len(systems)), key=lambda each: each != base_idx):
        common: defaultdict[int, list[str]] = defaultdict(list)
        for task in sorted(_tasks(systems[place])):
            common[first_of.setdefault(task, place)].append(task)
        for first, tasks in common.items():
            try:
                if first != place:
                    check_comparable(*select_tasks([systems[first], systems[place]], tasks))
            except DataError as error:
                if not force:
                    raise DataError(
                        f"{error} With --force the report compares their common questions, and states the difference."
                    ) from error
                text = str(error) if len(str(error)) <= _MAX_NOTE else f"{str(error)[:_MAX_NOTE]}…"
                notes[place, first] = (
                    f"{systems[place].name} is shown next to {systems[first].name} in spite of a difference: {text}"
                )
    return notes


def _tasks(system: SystemResults) -> set[str]:
    return {each.task for each in system.predictions}


def _shared_answers(
    first: SystemResults, second: SystemResults, tasks: Sequence[str]
) -> tuple[SystemResults, SystemResults] | None:
    """Both systems with the questions that all their files have, and with the first one's clusters and groups.

    None if there are no such questions.
    """
    files = [file for system in (first, second) for file in system.seeds]
    keys = set.intersection(*({(each.task, each.id) for each in file.predictions} for file in files))
    known = {(each.task, each.id): (each.cluster, each.group) for each in first.seeds[0].predictions}

    def restricted(file: ResultFile) -> ResultFile:
        kept = [each for each in file.predictions if (each.task, each.id) in keys and each.task in tasks]
        pairs = [(each, *known[each.task, each.id]) for each in kept]
        return replace(file, predictions=tuple(replace(each, cluster=c, group=g) for each, c, g in pairs))

    if not any(task in tasks for task, _ in keys):
        return None
    one, other = (replace(each, seeds=tuple(map(restricted, each.seeds))) for each in (first, second))
    return one, other


def _scores(
    results: SystemResults, tasks: Sequence[str], metric: Metric | None, lowercase: bool, num_draws: int
) -> SystemScores:
    found = system_stats(results, bleu_lowercase=lowercase)
    stats = {task: _with_headline(found[task], metric, results.name) for task in tasks if task in found}
    scored = score_stats(results, stats, num_draws)
    return scored if len(stats) == len(tasks) else replace(scored, average=None)


def _with_headline(stats: TaskStats, metric: Metric | None, system: str) -> TaskStats:
    """The statistics with this metric as headline."""
    if metric is None:
        return stats
    if metric not in stats.by_metric:
        raise ConfigError(
            f"{system} has no {metric} in task {stats.task}; it has {', '.join(stats.by_metric)}. Correct --metric, or "
            "name the tasks that have it with --tasks."
        )
    return replace(stats, by_metric={metric: stats.by_metric[metric], **stats.by_metric})


def _task_sizes(system: SystemScores, task: str) -> Sizes:
    lengths = [each.lengths for each in system.results.predictions if each.task == task]
    return task_sizes(lengths, system.results.seeds[0].protocol.get("ratio", "decoder"))


def task_sizes(lengths: Sequence[Mapping[str, int]], kind: str) -> Sizes:
    """Mean sizes of the prompts of a task.

    lengths: counts of each answer (`systems.system.Answer.lengths`).
    kind: `Protocol.ratio`. A system without vectors of its last document has the ratio "decoder" in any case.
    """
    pairs = [pair for each in lengths if (pair := _document_sizes(each, kind)) is not None]
    ratios = [tokens / rows for tokens, rows in pairs if rows > 0]
    ratio = None if not pairs else float(np.mean(ratios)) if ratios else math.inf
    return Sizes(
        ratio=ratio,
        ratio_of_sums=None if not pairs else _quotient(*map(sum, zip(*pairs, strict=True))),
        prompt_ratio=_quotient(*(_total(lengths, name) for name in ("open_book_rows", "prompt_rows"))),
        prompt_rows=_mean(lengths, "prompt_rows"),
        new_tokens=_mean(lengths, "new_tokens"),
    )


def _document_sizes(lengths: Mapping[str, int], kind: str) -> tuple[int, int] | None:
    """Tokens of a prompt's documents and their rows; None if unknown."""
    if kind == "encoder" and "last_vectors" in lengths and "last_document_encoder_tokens" in lengths:
        return lengths["last_document_encoder_tokens"], lengths["last_vectors"]
    tokens = lengths.get("document_decoder_tokens")
    if tokens is None:
        return (0, 0) if "prompt_rows" in lengths else None  # a prompt without documents, or unknown counts
    if "vectors" in lengths:
        return tokens, lengths["vectors"] + lengths.get("markers", 0)
    if "open_book_rows" in lengths and "prompt_rows" in lengths:
        return tokens, max(0, tokens - lengths["open_book_rows"] + lengths["prompt_rows"])
    return None


def _quotient(numerator: float | None, denominator: float | None) -> float | None:
    if numerator is None or denominator is None:
        return None
    return numerator / denominator if denominator > 0 else math.inf


def _total(lengths: Sequence[Mapping[str, int]], name: str) -> float | None:
    return sum(each[name] for each in lengths) if all(name in each for each in lengths) else None


def _mean(lengths: Sequence[Mapping[str, int]], name: str) -> float | None:
    return _quotient(_total(lengths, name), len(lengths))


def _first_of_each(samples: Sequence[DifferingSample], limit: int) -> list[DifferingSample]:
    """At most `limit` samples: the first ones of each system, task and sign in turn."""
    rank: Counter[tuple[str, str, bool]] = Counter()
    ranked = []
    for place, each in enumerate(samples):
        cell = (each.system, each.task, each.difference > 0)
        ranked.append((rank[cell], place))
        rank[cell] += 1
    return [samples[place] for place in sorted(place for _, place in sorted(ranked)[:limit])]


def _gaps_closed(systems: Sequence[SystemScores]) -> dict[tuple[str, str], GapClosed]:
    """The gap closed of each system and task with answer NLLs: (b - nll) / (b - open), b = min(closed, mismatched)."""
    gaps = {}
    for system in systems:
        same_decoder = [each for each in systems if decoder_of(each) == decoder_of(system)]
        by_role = {role_of(each): each for each in reversed(same_decoder)}
        if role_of(system) in ("closed", "open") or not {"closed", "open"} <= by_role.keys():
            continue
        for task in system.stats:
            found = {role: each.draws.get(task, {}).get("nll") for role, each in by_role.items()}
            if (gap := _gap(system, task, by_role, found)) is not None:
                gaps[system.name, task] = gap
    return gaps


def _gap(
    system: SystemScores, task: str, by_role: Mapping[str, SystemScores], draws: Mapping[str, Any]
) -> GapClosed | None:
    floors = [role for role in ("closed", "mismatched") if draws.get(role) is not None]
    if "nll" not in system.draws[task] or draws["open"] is None or "closed" not in floors:
        return None
    nll = {role: by_role[role].by_task[task]["nll"].value for role in (*floors, "open")}
    floor, open_book = min(nll[role] for role in floors), nll["open"]
    if floor <= open_book:
        return None
    floor_R = np.min([draws[role] for role in floors], axis=0)
    gaps_R = (floor_R - system.draws[task]["nll"]) / (floor_R - draws["open"])
    gaps_S = (floor - seed_scores(system.stats[task], "nll")) / (floor - open_book)
    found = uncertainty(gaps_S.mean(), [(gaps_R, system.stats[task].num_clusters)], seeds=[gaps_S])
    return GapClosed(float(gaps_S.mean()), found.low, found.high)


def decoder_of(system: SystemScores) -> str:
    """The name of its decoder; empty if unknown."""
    return system.results.seeds[0].predictions[0].decoder


def role_of(system: SystemScores) -> str:
    """ "closed", "open" or "mismatched", by the system's kind or else by its name; empty for other systems."""
    file = system.results.seeds[0]
    text = str(file.description.get("kind") or file.system or system.name).lower()
    return next((role for role in ("closed", "open", "mismatched") if text.startswith(role)), "")

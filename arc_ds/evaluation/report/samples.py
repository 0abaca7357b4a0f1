"""Samples in which a system differs from the baseline."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from arc_ds.evaluation.metrics import score_of
from arc_ds.evaluation.results import Prediction, SystemResults
from arc_ds.evaluation.scoring import TaskStats

_SAME = 1e-6  # points


@dataclass(frozen=True, kw_only=True)
class DifferingSample:
    """A sample with the answers of the baseline and of another system. Of several training seeds it has the first.

    question: its question; empty if the result files have none.
    system: name of the other system.
    baseline_score, score: headline score of the sample in points of 100, as mean over training seeds.
    difference: improvement over the baseline.
    """

    task: str
    id: str
    question: str
    references: tuple[str, ...]
    system: str
    baseline_prediction: str
    prediction: str
    baseline_score: float
    score: float
    difference: float


class PairCounts(NamedTuple):
    """Numbers of samples in which a system is better than the baseline, worse, and equal."""

    better: int
    worse: int
    equal: int


def differing_samples(
    baseline: SystemResults, other: SystemResults, ours: TaskStats, theirs: TaskStats, limit: int
) -> tuple[PairCounts, list[DifferingSample]]:
    """Samples of one task in which two systems have different scores, the largest differences first.

    Equal differences are ordered by a hash of the id: they are a random choice that does not depend on the systems.

    ours, theirs: statistics of the baseline and of the other system, of the same questions.
    limit: most samples of each sign.
    """
    metric = ours.headline
    first_N, second_N = (score_of(metric, stats.by_metric[metric]).mean(axis=0) for stats in (ours, theirs))
    gains_N = (second_N - first_N) * (-1 if metric == "nll" else 1)  # lower NLL is better
    is_better_N, is_worse_N = gains_N > _SAME, gains_N < -_SAME
    first, second = (_sorted_answers(system, ours.task) for system in (baseline, other))
    found = []
    for is_chosen_N in (is_better_N, is_worse_N):
        chosen = np.flatnonzero(is_chosen_N)
        order = sorted(
            chosen, key=lambda n: (-round(abs(gains_N[n]), 3), hashlib.sha256(first[n].id.encode()).digest())
        )
        found += [
            DifferingSample(
                task=ours.task,
                id=first[n].id,
                question=_question(first[n]) or _question(second[n]),
                references=first[n].references,
                system=other.name,
                baseline_prediction=first[n].prediction,
                prediction=second[n].prediction,
                baseline_score=float(first_N[n]),
                score=float(second_N[n]),
                difference=float(gains_N[n]),
            )
            for n in order[:limit]
        ]
    better, worse = int(is_better_N.sum()), int(is_worse_N.sum())
    return PairCounts(better, worse, len(gains_N) - better - worse), found


def _sorted_answers(system: SystemResults, task: str) -> list[Prediction]:
    """The answers of its first training seed in the order of `TaskStats`; of several to one question, the first."""
    found = {each.id: each for each in reversed(system.seeds[0].predictions) if each.task == task}
    return [found[name] for name in sorted(found)]


def _question(prediction: Prediction) -> str:
    question = prediction.others.get("question")
    return question if isinstance(question, str) else ""

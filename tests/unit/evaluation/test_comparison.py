"""Paired comparisons: differences, tests, and results that cannot be compared."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from statsmodels.regression.linear_model import OLS

from arc_ds.errors import DataError
from arc_ds.evaluation.comparison import Comparison, compare_systems
from arc_ds.evaluation.results import Prediction, ResultFile, SystemResults
from arc_ds.evaluation.scoring import score_system
from tests.unit.evaluation.test_scoring import questions, system, translations


def compared(first: SystemResults, second: SystemResults) -> Comparison:
    return compare_systems(first, second)[0]


def improved(lines: Sequence[Prediction], every: int) -> list[Prediction]:
    """Answers of which every n-th one is right."""
    return [replace(line, prediction="Rome") if i % every == 0 else line for i, line in enumerate(lines)]


def test_a_difference_is_paired() -> None:
    first = [replace(line, cluster="") for line in questions(300, 0.4)]
    second = improved(first, 10)
    found = compared(system(first), system(second)).by_task["squad"]["em"]
    x, y = (np.array([100.0 * (line.prediction == "Rome") for line in lines]) for lines in (first, second))
    assert (found.first, found.second, found.n) == (pytest.approx(x.mean()), pytest.approx(y.mean()), 300)
    assert found.value == pytest.approx((y - x).mean()) and found.value > 2
    assert found.stderr == pytest.approx((y - x).std(ddof=1) / 300**0.5, rel=1e-6)
    assert found.detectable == pytest.approx(scipy.stats.t.ppf((0.975, 0.8), 299).sum() * found.stderr, rel=1e-5)
    assert (found.high - found.low) / 3.92 == pytest.approx(
        found.stderr, rel=0.1
    ) and found.low < found.value < found.high
    apart = [score_system(system(lines)).by_task["squad"]["em"].stderr for lines in (first, second)]
    assert found.stderr < 0.5 * np.hypot(*apart)  # pairs matter
    only_second = int(((y > 0) & (x == 0)).sum())
    assert found.test == "mcnemar" and found.p == pytest.approx(scipy.stats.binomtest(0, only_second).pvalue)
    assert found.p_holm == found.p and compared(system(first), system(second)).by_task["squad"]["f1"].p_holm is None


def test_clustered_answers_are_flipped_by_cluster() -> None:
    first, second = questions(300, 0.4), questions(300, 0.5, seed=9)
    found = compared(system(first), system(second)).by_task["squad"]["em"]
    x, y = (np.array([100.0 * (line.prediction == "Rome") for line in lines]) for lines in (first, second))
    fit = OLS(y - x, np.ones(300)).fit(cov_type="cluster", cov_kwds={"groups": np.arange(300) // 3})
    assert found.test == "sign-flip" and found.stderr == pytest.approx(fit.bse[0], rel=1e-9)
    sums = (y - x).reshape(100, 3).sum(axis=1)
    oracle = scipy.stats.permutation_test((sums,), np.sum, permutation_type="samples", n_resamples=10_000, rng=1)
    assert found.p == pytest.approx(oracle.pvalue, abs=0.02)


def test_equal_systems_do_not_differ() -> None:
    lines = [*questions(60, 0.4), *translations(20, ["eng-fra", "eng-deu"], 0.8)]
    found = compared(system(lines), system(lines[::-1]))
    for metrics in found.by_task.values():
        for each in metrics.values():
            assert (each.value, each.low, each.high, each.p) == (0.0, 0.0, 0.0, 1.0)
            assert np.isnan(each.detectable)


def test_bleu_flips_whole_sentences_of_all_directions() -> None:
    groups = ["eng-fra", "eng-deu"]
    first, state = translations(5, groups, 0.6), random.Random(55)
    words = [line.references[0].split() for line in first]
    second = [
        replace(line, prediction=" ".join(word for word in each if state.random() < 0.7))
        for line, each in zip(first, words, strict=True)
    ]
    found = compared(system(first), system(second)).by_task["flores"]["bleu"]
    values = []  # of all exchanges of sentences, scored anew
    for mask in range(32):
        pairs = [(b, a) if mask >> i % 5 & 1 else (a, b) for i, (a, b) in enumerate(zip(first, second, strict=True))]
        scores = [
            score_system(system(list(lines)), 2).by_task["flores"]["bleu"].value for lines in zip(*pairs, strict=True)
        ]
        values.append(scores[1] - scores[0])
    oracle = np.mean(np.abs(values) >= abs(values[0]) - 1e-9)
    assert found.p == pytest.approx(oracle) and 1 / 16 < oracle < 1 and found.value == pytest.approx(values[0])


def test_p_values_are_adjusted_for_the_number_of_tasks() -> None:
    first = [replace(line, cluster="") for task in ("nq", "squad") for line in questions(200, 0.4, task=task)]
    second = improved(first, 30)
    found = compared(system(first), system(second))
    ps = [found.by_task[task]["em"] for task in ("nq", "squad")]
    small, large = sorted(each.p for each in ps if each.p is not None)
    assert sorted(each.p_holm for each in ps if each.p_holm is not None) == [2 * small, max(2 * small, large)]
    assert found.average is not None and found.average.value == pytest.approx(np.mean([each.value for each in ps]))
    assert found.average.stderr == pytest.approx(np.hypot(ps[0].stderr, ps[1].stderr) / 2, rel=0.05)


def test_the_spread_of_the_seeds_of_both_systems_counts() -> None:
    seeds = [questions(150, share, seed=i) for i, share in enumerate((0.3, 0.5, 0.6))]
    better = [improved(lines, 8) for lines in seeds]
    one = compared(system(seeds[0]), system(better[0])).by_task["squad"]["em"]
    three = compared(system(*seeds), system(*better)).by_task["squad"]["em"]
    assert three.stderr > 3 * one.stderr and three.test == "welch"
    apart = [score_system(system(*each)).by_task["squad"]["em"].seed_sd or 0.0 for each in (seeds, better)]
    assert three.stderr > np.hypot(*apart) / 3**0.5
    assert three.low < 0 < three.value < three.high and one.low > 0
    assert three.p is not None and one.p is not None and one.p < 0.05 < three.p


def test_clusters_of_one_file_serve_both() -> None:
    first, second = questions(60, 0.4), questions(60, 0.6, seed=3)
    wanted = compared(system(first), system(second))
    without = [replace(line, cluster="") for line in second]
    assert compared(system(first), system(without)).by_task == wanted.by_task
    without = [replace(line, cluster="") for line in first]
    assert compared(system(without), system(second)).by_task == wanted.by_task


def test_clusters_and_groups_of_different_files_serve_all() -> None:
    lines = [*translations(20, ["eng-fra"], 0.8), *translations(20, ["eng-deu"], 0.6)]
    others = [*translations(20, ["eng-fra"], 0.7), *translations(20, ["eng-deu"], 0.6)]
    others = [replace(other, references=line.references) for line, other in zip(lines, others, strict=True)]
    wanted = compared(system(lines), system(others))
    groups = [replace(line, cluster="") for line in lines]
    clusters = [replace(line, group="") for line in others]
    found = compared(system(groups), system(clusters))
    assert found.by_task == wanted.by_task and found.by_task["flores"]["bleu"].num_clusters == 20


def test_others_of_different_clusters_are_refused() -> None:
    lines = questions(30, 0.4)
    bare, other = [replace(line, cluster="") for line in lines], [replace(line, cluster="x") for line in lines]
    with pytest.raises(
        DataError, match=r"id 'q0' of task 'squad' has cluster 'x' and .* another answer to it has 'p0'"
    ):
        compare_systems(system(bare), system(lines), system(other))


def test_sampled_answers_are_compared_by_question() -> None:
    first = [replace(line, cluster="") for line in questions(60, 0.4)]
    second = [replace(line, prediction="Oslo", seed=3) for line in first] + improved(first, 3)
    found = compared(system(first), system(second)).by_task["squad"]["em"]
    x, y = (np.array([line.prediction == "Rome" for line in lines], dtype=float) for lines in (first, second[60:]))
    gains = 100 * (y / 2 - x)
    assert (found.value, found.n, found.test) == (pytest.approx(gains.mean()), 60, "sign-flip")
    assert found.stderr == pytest.approx(gains.std(ddof=1) / 60**0.5)
    oracle = scipy.stats.permutation_test((gains,), np.sum, permutation_type="samples", n_resamples=10_000, rng=1)
    assert found.p == pytest.approx(oracle.pvalue, abs=0.02)


def file(lines: Sequence[Prediction], name: str, **run: object) -> SystemResults:
    return SystemResults(
        name=name, seeds=(ResultFile(path=Path(name), system=name, predictions=tuple(lines), run=run),)
    )


LINES = questions(30, 0.4)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            file(LINES[1:], "b"),
            r"of task 'squad', 1 ids are \(q0\) only in the first one and 0 ids are only in the second",
        ),
        (
            file([replace(LINES[0], references=("Oslo",)), *LINES[1:]], "b"),
            r"id 'q0' of task 'squad' has references \['rome', 'Roma'\] in the first one and \['Oslo'\] in the second",
        ),
        (
            file([replace(LINES[0], cluster="x"), *LINES[1:]], "b"),
            "id 'q0' of task 'squad' has cluster 'p0' in the first",
        ),
        (
            file([replace(line, task="nq") for line in LINES], "b"),
            "they have the tasks squad and nq. Name common tasks",
        ),
        (
            file(LINES, "b", data_digest="2"),
            "a and b cannot be compared: their data digests of task 'squad' are 1 and 2",
        ),
        (file(LINES, "b", data_digest={"squad": "3"}), "their data digests of task 'squad' are 1 and 3"),
        (
            file(LINES, "b", protocol={"name": "x", "examples": "split", "ratio": "decoder"}),
            r"their protocols differ in examples \('reference' and 'split'\). Evaluate both with the same protocol",
        ),
    ],
)
def test_results_of_other_data_or_protocol_are_refused(other: SystemResults, message: str) -> None:
    ours = file(LINES, "a", data_digest="1", protocol={"name": "y", "examples": "reference", "ratio": "decoder"})
    with pytest.raises(DataError, match=message):
        compared(ours, other)


def test_digests_of_other_tasks_do_not_matter() -> None:
    digests = [{"squad": "1", "nq": name} for name in "ab"]
    first, second = (file(LINES, "a", data_digest=digest) for digest in digests)
    assert compared(first, second).by_task["squad"]["em"].value == 0


def test_results_of_other_programs_need_no_digest_and_no_protocol() -> None:
    ours = file(LINES, "a", data_digest="1", protocol={"bleu_lowercase": True})
    assert compared(ours, file(LINES, "b")).by_task["squad"]["em"].value == 0
    lines = [replace(line, prediction=line.prediction.upper()) for line in translations(20, [""], 0.9)]
    found = compared(system(lines), system(lines, run={"protocol": {"bleu_lowercase": True}})).by_task["flores"]
    assert found["bleu"].first == found["bleu"].second > 50

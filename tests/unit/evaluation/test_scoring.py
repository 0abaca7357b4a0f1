"""Scores of result files: groups, clusters, seeds and averages."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from statsmodels.regression.linear_model import OLS

from arc_ds.errors import DataError
from arc_ds.evaluation.results import Prediction, ResultFile, SystemResults
from arc_ds.evaluation.scoring import score_draws, score_system, system_stats


def system(*seeds: Sequence[Prediction], run: dict[str, object] | None = None) -> SystemResults:
    files = (
        ResultFile(path=Path(f"{i}.jsonl"), system="", predictions=tuple(s), run=run or {}) for i, s in enumerate(seeds)
    )
    return SystemResults(name="ours", seeds=tuple(files))


def questions(num: int, share: float, seed: int = 0, task: str = "squad") -> list[Prediction]:
    """Three questions for each paragraph, of which whole paragraphs are easier or harder."""
    state = random.Random(seed)
    found = []
    for i in range(num):
        if i % 3 == 0:
            ease = state.uniform(-share, share) * 0.8
        text = "Rome" if state.random() < share + ease else "in Paris"
        found.append(
            Prediction(id=f"q{i}", task=task, prediction=text, references=("rome", "Roma"), cluster=f"p{i // 3}")
        )
    return found


def translations(num: int, groups: Sequence[str], share: float, seed: int = 0) -> list[Prediction]:
    state = random.Random(seed)
    found = []
    for group in groups:
        for i in range(num):
            words = [f"w{state.randint(0, 30)}" for _ in range(9)]
            kept = " ".join(word for word in words if state.random() < share)
            line = Prediction(id=f"{group}-{i}", task="flores", prediction=kept, references=(" ".join(words),))
            found.append(replace(line, cluster=f"s{i}", group=group))
    return found


def test_a_mean_has_the_clustered_error_of_statsmodels_and_the_interval_of_its_draws() -> None:
    lines = questions(300, 0.4)
    scores = score_system(system(lines))
    score = scores.by_task["squad"]["em"]
    x = np.array([100.0 * (line.prediction == "Rome") for line in lines])
    fit = OLS(x, np.ones(300)).fit(cov_type="cluster", cov_kwds={"groups": np.arange(300) // 3})
    assert (score.value, score.n, score.num_clusters) == (pytest.approx(x.mean()), 300, 100)
    assert score.stderr == pytest.approx(fit.bse[0], rel=1e-9)
    assert (score.high - score.low) / 3.92 == pytest.approx(fit.bse[0], rel=0.05)
    alone = score_system(system([replace(line, cluster="") for line in lines])).by_task["squad"]["em"]
    assert alone.num_clusters == 300 and alone.stderr < 0.9 * score.stderr
    assert list(scores.by_task["squad"]) == ["em", "f1", "substring", "approx_em"] and scores.average is None


def test_a_task_of_groups_is_the_mean_of_their_corpora() -> None:
    lines = [*translations(40, ["eng-fra"], 0.9), *translations(40, ["eng-deu"], 0.7, seed=1)]
    corpora = [
        sacrebleu.corpus_bleu([x.prediction for x in half], [[x.references[0] for x in half]]).score
        for half in (lines[:40], lines[40:])
    ]
    score = score_system(system(lines)).by_task["flores"]["bleu"]
    assert score.value == pytest.approx(np.mean(corpora), rel=1e-13)
    assert (score.n, score.num_clusters) == (80, 40)
    pooled = score_system(system([replace(line, group="") for line in lines])).by_task["flores"]["bleu"]
    assert pooled.value != pytest.approx(score.value, rel=1e-3)
    assert score.low < score.value < score.high and score.stderr == pytest.approx(
        (score.high - score.low) / 3.92, rel=0.1
    )


def test_groups_see_the_same_drawn_sentences() -> None:
    """Two directions with equal answers: their mean varies as much as one of them, not less."""
    one = translations(40, ["eng-fra"], 0.8)
    other = [replace(line, id=f"x{line.id}", group="eng-deu") for line in one]
    draws = [score_draws(system_stats(system(lines))["flores"], 200)["bleu"] for lines in (one, one + other)]
    assert np.allclose(*draws, rtol=1e-12)


def test_the_case_of_bleu_follows_the_protocol() -> None:
    lines = [replace(line, prediction=line.prediction.upper()) for line in translations(20, [""], 0.9)]
    clean = score_system(system(lines)).by_task["flores"]
    reference = score_system(system(lines, run={"protocol": {"bleu_lowercase": True}})).by_task["flores"]
    assert clean["bleu"].value < 5 < 50 < clean["bleu_other_case"].value == reference["bleu"].value
    assert reference["bleu_other_case"].value == clean["bleu"].value


def test_three_seeds_widen_the_interval_by_their_own_spread() -> None:
    seeds = [questions(300, share, seed=i) for i, share in enumerate((0.3, 0.4, 0.6))]
    scores = [score_system(system(*seeds[:num])).by_task["squad"]["em"] for num in (1, 2, 3)]
    values = [100 * np.mean([line.prediction == "Rome" for line in lines]) for lines in seeds]
    assert scores[2].value == pytest.approx(np.mean(values)) and scores[2].seed_sd == pytest.approx(
        np.std(values, ddof=1)
    )
    widths = [score.high - score.low for score in scores]
    assert widths[1] < widths[0] and widths[2] > 2 * widths[1]
    assert scores[0].seed_sd is None and scores[1].seed_sd == pytest.approx(np.std(values[:2], ddof=1))
    assert all(score.n == 300 for score in scores)


def test_seeds_of_other_questions_are_refused() -> None:
    lines = questions(30, 0.5)
    with pytest.raises(
        DataError, match=r"0.jsonl and 1.jsonl cannot be compared: of task 'squad', 1 ids are \(q7\) only"
    ):
        score_system(system(lines, lines[:7] + lines[8:]))


def test_an_average_draws_within_tasks() -> None:
    lines = [*questions(300, 0.4), *translations(40, ["eng-fra"], 0.9)]
    scores = score_system(system(lines))
    headlines = scores.by_task["squad"]["em"], scores.by_task["flores"]["bleu"]
    assert scores.average is not None
    assert scores.average.value == pytest.approx(np.mean([score.value for score in headlines]))
    apart = np.hypot(headlines[0].stderr, headlines[1].stderr) / 2
    assert scores.average.stderr == pytest.approx(apart, rel=0.05)


def test_nll_is_a_ratio_over_tokens_if_every_answer_has_it() -> None:
    lines = [
        replace(line, nll={"nats": 2.0 * (i % 3 + 1), "tokens": i % 3 + 1}) for i, line in enumerate(questions(30, 0.5))
    ]
    lines[0] = replace(lines[0], nll={"nats": 20.0, "tokens": 1})
    score = score_system(system(lines)).by_task["squad"]["nll"]
    assert score.value == pytest.approx((20 - 2 + 2 * 60) / 60) and score.low < score.value < score.high
    assert score.stderr == pytest.approx(18 / 60, rel=0.1)
    assert "nll" not in score_system(system([*lines[:-1], replace(lines[-1], nll=None)])).by_task["squad"]


def test_one_cluster_has_no_interval() -> None:
    lines = [replace(line, cluster="one") for line in questions(30, 0.5)]
    score = score_system(system(lines)).by_task["squad"]["em"]
    assert np.isnan([score.low, score.high, score.stderr]).all() and 0 < score.value < 100


def test_empty_answers_are_scored_and_counted() -> None:
    lines = [replace(line, prediction=" ") if i < 3 else line for i, line in enumerate(questions(30, 0.5))]
    assert score_system(system(lines)).num_empty == {"squad": 3}

"""Scores of result files: groups, clusters, seeds and averages."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import scipy.stats
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
    names = [line.cluster for line in sorted(lines, key=lambda line: line.id)]
    places = scores.stats["squad"].clusters_N  # their order fixes the draws
    assert np.array_equal(places, np.unique(names, return_inverse=True)[1])
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


def test_groups_of_a_mean_have_the_clustered_error_of_their_mean() -> None:
    groups = ["a", "b"]
    lines = [replace(line, task="qa", prediction=line.references[0]) for line in translations(60, groups, 1.0)]
    lines = [replace(line, prediction="x") if i % 60 < 20 or i % 5 == 0 else line for i, line in enumerate(lines)]
    score = score_system(system(lines)).by_task["qa"]["em"]
    x = np.array([100.0 * (line.prediction != "x") for line in lines])
    fit = OLS(x, np.ones(120)).fit(cov_type="cluster", cov_kwds={"groups": np.arange(120) % 60})
    assert score.stderr == pytest.approx(fit.bse[0], rel=1e-9)


def test_draws_without_a_group_count_the_others() -> None:
    lines = [replace(line, group="rare" if i < 2 else "") for i, line in enumerate(translations(12, [""], 0.8))]
    score = score_system(system(lines)).by_task["flores"]["chrf"]
    assert 0 < score.low < score.value < score.high < 100


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
    assert scores.average.stderr == pytest.approx(apart, rel=0.05) and scores.average.seed_sd is None
    twice = score_system(system([*lines[:300], *(replace(line, task="nq") for line in lines[:300])])).average
    assert twice is not None  # two tasks do not share draws
    assert twice.high - twice.low == pytest.approx((headlines[0].high - headlines[0].low) / 2**0.5, rel=0.05)
    seeds = [replace(line, prediction="Rome") if line.task == "squad" else line for line in lines]
    three = score_system(system(lines, seeds, seeds)).average
    assert three is not None and three.seed_sd is not None
    assert three.value == pytest.approx(scores.average.value + (100 - headlines[0].value) / 3)
    assert three.stderr > three.seed_sd / 3**0.5 and three.low < scores.average.low < scores.average.high < three.high
    assert three.seed_sd == pytest.approx((100 - headlines[0].value) / 2 / 3**0.5)


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
    scores = score_system(system([*lines, *questions(30, 0.5, task="nq")]))
    score = scores.by_task["squad"]["em"]
    assert np.isnan([score.low, score.high, score.stderr]).all() and 0 < score.value < 100
    assert scores.average is not None and np.isnan([scores.average.low, scores.average.stderr]).all()


@pytest.mark.parametrize(("prediction", "right"), [("Rome", 1), ("Oslo", 0)])
def test_equal_answers_have_the_interval_of_a_binomial(prediction: str, right: int) -> None:
    lines = [replace(line, prediction=prediction) for line in questions(30, 0.5)]
    score = score_system(system(lines)).by_task["squad"]["em"]
    oracle = scipy.stats.binomtest(10 * right, 10).proportion_ci()
    assert (score.low, score.high) == pytest.approx((100 * oracle.low, 100 * oracle.high))
    assert score.stderr == 0


def test_sampled_answers_count_as_one_question() -> None:
    state = random.Random(5)
    lines = [replace(line, cluster="") for line in questions(40, 0.5)]
    sampled = [
        replace(line, seed=seed, prediction=state.choice(("Rome", "Oslo")))
        for i, line in enumerate(lines)
        for seed in range(1 + i % 4)
    ]
    state.shuffle(sampled)
    means = [
        100 * np.mean([each.prediction == "Rome" for each in sampled if each.id == line.id])
        for line in sorted(lines, key=lambda each: each.id)
    ]
    found = score_system(system(sampled))
    score = found.by_task["squad"]["em"]
    assert (score.value, score.n, score.num_clusters) == (pytest.approx(np.mean(means)), 40, 40)
    assert score.stderr == pytest.approx(np.std(means, ddof=1) / 40**0.5)
    assert found.stats["squad"].by_metric["em"][0, :, 0] == pytest.approx(np.divide(means, 100))
    wrong = [*sampled, replace(sampled[0], seed=9, references=("Oslo",))]
    with pytest.raises(DataError, match=r"0.jsonl: the answers to id '.*' of task 'squad' have references \["):
        score_system(system(wrong))


def test_a_sample_without_a_cluster_is_not_in_the_cluster_that_has_its_id() -> None:
    lines = questions(9, 0.5)
    lines[8] = replace(lines[8], id="p0", cluster="")
    assert score_system(system(lines)).by_task["squad"]["em"].num_clusters == 4


def test_clusters_of_any_training_seed_serve_all() -> None:
    lines = questions(30, 0.5)
    bare = [replace(line, cluster="") for line in lines]
    assert score_system(system(bare, lines)).by_task["squad"]["em"].num_clusters == 10
    sampled = [*bare, *(replace(line, seed=1) for line in lines)]
    assert score_system(system(sampled)).by_task["squad"]["em"].num_clusters == 10


def test_empty_answers_and_blank_references_are_counted() -> None:
    lines = [replace(line, prediction=" ") if i < 3 else line for i, line in enumerate(questions(30, 0.5))]
    lines[5] = replace(lines[5], references=("Rome", " "))
    stats = score_system(system(lines)).stats["squad"]
    assert (stats.num_empty, stats.num_blank) == (3, 1)

"""Metrics equal the reference programs on random and adversarial answers, to the last digit."""

from __future__ import annotations

import logging
import random
import string
import unicodedata
from collections.abc import Callable

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from arc_ds.evaluation import metrics
from arc_ds.evaluation.datasets import TASKS
from arc_ds.evaluation.metrics import METRICS_OF, Answer, metrics_of, sample_stats, score_of
from arc_ds.evaluation.task import Metric

_ADVERSARIAL = (
    "", " ", "the", "a", "An", "the the", "The-cat", "the–cat", "a.n", "U.S.A.", "u s a", "yes", "Yes.", "no",
    "noanswer", "no answer", "1,000", "1 000", "12.5%", "$12", "Zürich", "Zu\u0308rich", "ΑΣ", "ας", "İstanbul",
    "straße", "STRASSE", "ﬁne", "日本", "日 本", "e\u0301", "\u00a0x\u00a0", "x\ny", "don't", "dont", "(a) b", "_",
    "__init__", "the\u0301", "🙂 ok", "ran running runs", "cats and dogs", "Cats, and Dogs!", "a b c d e", "e d c b a",
    '"quoted"', "&quot;", "x-ray", "xray", "≠", "=",
)  # fmt: skip
_WORDS = (
    "the", "a", "an", "The", "cat", "sat", "on", "mat.", "mat,", "Running", "runs", "ran", "dogs", "7", "1,000",
    "yes", "no", "U.S.", "über", "É", "—", "don't", "(", ")", "%", "x",
)  # fmt: skip


def random_text(random_state: random.Random) -> str:
    if random_state.random() < 0.3:
        return random_state.choice(_ADVERSARIAL)
    words = random_state.choices(_WORDS, k=random_state.randint(0, 12))
    return random_state.choice((" ", "  ", " ", "\n")).join(words)


def make_answers(num: int) -> list[Answer]:
    """Random pairs; in half of them the prediction is made of a reference, so that scores are not all 0."""
    state = random.Random(16)
    answers = []
    for _ in range(num):
        references = [random_text(state) for _ in range(state.choice((1, 1, 2, 4)))]
        prediction = random_text(state)
        if state.random() < 0.5:
            words = state.choice(references).split(" ")
            prediction = " ".join(word for word in words if state.random() < 0.8)
        answers.append(Answer("squad", prediction, references))
    return answers


ANSWERS = make_answers(1000)


# The oracles follow the descriptions of the metrics without regular expressions.
def squad_words(text: str, *, articles_first: bool = False) -> list[str]:
    def without_articles(text: str) -> str:
        runs: list[str] = []
        for char in text:
            if runs and char.isalnum() and runs[-1][-1].isalnum():
                runs[-1] += char
            else:
                runs.append(char)
        return "".join(" " if run in ("a", "an", "the") else run for run in runs)

    def without_punctuation(text: str) -> str:
        return "".join(char for char in text if char not in string.punctuation)

    text = text.lower()
    if articles_first:
        return without_punctuation(without_articles(text)).split()
    return without_articles(without_punctuation(text)).split()


def squad_f1(prediction: str, reference: str) -> float:
    predicted, wanted = squad_words(prediction), squad_words(reference)
    left, num_same = list(wanted), 0
    for word in predicted:
        if word in left:
            left.remove(word)
            num_same += 1
    if not num_same:
        return 0.0
    precision, recall = num_same / len(predicted), num_same / len(wanted)
    return (2 * precision * recall) / (precision + recall)


def hotpotqa_f1(prediction: str, reference: str) -> float:
    one, other = " ".join(squad_words(prediction)), " ".join(squad_words(reference))
    special = ("yes", "no", "noanswer")
    if (one in special or other in special) and one != other:
        return 0.0
    return squad_f1(prediction, reference)


def squad2_f1(prediction: str, reference: str) -> float:
    predicted, wanted = squad_words(prediction), squad_words(reference)
    return float(predicted == wanted) if not predicted or not wanted else squad_f1(prediction, reference)


def contains(tokens: list[str], wanted: list[str]) -> float:
    return float(any(tokens[i : i + len(wanted)] == wanted for i in range(len(tokens) - len(wanted) + 1)))


def drqa_tokens(text: str) -> list[str]:
    tokens: list[str] = []
    goes_on = False
    for char in unicodedata.normalize("NFD", text):
        kind = unicodedata.category(char)[0]
        if kind in "LNM" and goes_on:
            tokens[-1] += char
        elif kind not in "ZC":
            tokens.append(char)
        goes_on = kind in "LNM"
    return [token.lower() for token in tokens]


ORACLES: dict[str, Callable[[str, str], float]] = {
    "em": lambda prediction, reference: float(squad_words(prediction) == squad_words(reference)),
    "f1": squad_f1,
    "approx_em": lambda p, r: contains(" ".join(squad_words(p)).split(" "), " ".join(squad_words(r)).split(" ")),
    "substring": lambda prediction, reference: contains(drqa_tokens(prediction), drqa_tokens(reference)),
}


@pytest.mark.parametrize("metric", ORACLES)
def test_answers_score_as_in_the_reference_programs(metric: Metric) -> None:
    ours = [sample_stats(metric, answer) for answer in ANSWERS]
    oracle = [max(ORACLES[metric](answer.prediction, each) for each in answer.references) for answer in ANSWERS]
    assert ours == [(score, 1.0) for score in oracle]
    assert 0.05 < np.mean(oracle) < 0.95
    first_only = [ORACLES[metric](answer.prediction, answer.references[0]) for answer in ANSWERS]
    assert first_only != oracle  # the maximum over references counts


def test_each_adversarial_text_scores_against_each() -> None:
    for prediction in _ADVERSARIAL:
        for reference in _ADVERSARIAL:
            for metric, oracle in ORACLES.items():
                (score, _) = sample_stats(metric, Answer("nq", prediction, [reference]))  # type: ignore[arg-type]
                assert score == oracle(prediction, reference), (metric, prediction, reference)


def test_the_order_of_normalisation_counts() -> None:
    wrong = [squad_words(text, articles_first=True) != squad_words(text) for text in _ADVERSARIAL]
    assert any(wrong)
    assert [metrics.normalize_answer(text).split() for text in _ADVERSARIAL] == list(map(squad_words, _ADVERSARIAL))


@pytest.mark.parametrize(("task", "oracle"), [("hotpotqa:dev", hotpotqa_f1), ("squad2", squad2_f1)])
def test_f1_has_the_rule_of_its_task(task: str, oracle: Callable[[str, str], float]) -> None:
    pairs = [
        (one, other) for one in (*_ADVERSARIAL, "yes it is", "no.") for other in (*_ADVERSARIAL, "yes it is", "no.")
    ]
    ours = [sample_stats("f1", Answer(task, one, [other]))[0] for one, other in pairs]
    assert ours == [oracle(one, other) for one, other in pairs]
    assert ours != [squad_f1(one, other) for one, other in pairs]


def test_silence_answers_an_unanswerable_question_of_squad2() -> None:
    pairs = {("", "unanswerable"): 1, ("Unanswerable.", ""): 1, ("the", "unanswerable"): 1, ("Rome", "unanswerable"): 0}
    for task, by_rule in (("squad2", 1), ("squad2:dev", 1), ("squad", 0)):
        for (prediction, reference), score in pairs.items():
            for metric in ("em", "f1"):
                found = sample_stats(metric, Answer(task, prediction, [reference]))  # type: ignore[arg-type]
                assert found == (score * by_rule, 1.0)


def test_rouge_l_is_that_of_rouge_score_with_the_stemmer() -> None:
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    ours = [sample_stats("rouge_l", answer)[0] for answer in ANSWERS]
    oracle = [scorer.score_multi(answer.references, answer.prediction)["rougeL"].fmeasure for answer in ANSWERS]
    assert ours == oracle
    plain = RougeScorer(["rougeL"])
    assert ours != [plain.score_multi(each.references, each.prediction)["rougeL"].fmeasure for each in ANSWERS]


def corpus_score(metric: Metric, answers: list[Answer], *, lowercase: bool = False) -> float:
    """The score of sacrebleu itself."""
    num = max(len(answer.references) for answer in answers)
    streams = [[dict(enumerate(answer.references)).get(i) for answer in answers] for i in range(num)]
    predictions = [answer.prediction for answer in answers]
    if metric == "chrf":
        return sacrebleu.corpus_chrf(predictions, streams).score  # type: ignore[arg-type]
    return sacrebleu.corpus_bleu(predictions, streams, lowercase=lowercase).score  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("metric", "lowercase"), [("bleu", False), ("bleu", True), ("bleu_other_case", False), ("chrf", False)]
)
def test_sums_of_statistics_score_as_in_sacrebleu(metric: Metric, lowercase: bool) -> None:
    stats = np.array([sample_stats(metric, answer, bleu_lowercase=lowercase) for answer in ANSWERS])
    state = random.Random(1)
    subsets = [list(range(1000)), *([i] for i in range(20))]
    subsets += [state.choices(range(1000), k=state.randint(1, 60)) for _ in range(20)]
    ours = score_of(metric, np.array([stats[subset].sum(axis=0) for subset in subsets]))
    is_lower = lowercase == (metric == "bleu")
    oracle = [corpus_score(metric, [ANSWERS[i] for i in subset], lowercase=is_lower) for subset in subsets]
    np.testing.assert_allclose(ours, oracle, rtol=1e-14, atol=0)
    assert 5 < ours[0] < 95 and 0.0 in oracle
    if metric != "chrf":
        assert ours[0] != corpus_score(metric, ANSWERS, lowercase=not is_lower)


def test_a_sum_over_no_answer_has_no_score() -> None:
    assert np.isnan(score_of("bleu", np.zeros(11))) and np.isnan(score_of("em", np.zeros(2)))


def test_an_unknown_task_is_scored_as_qa_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert metrics_of("needle in hay") == metrics_of("qa")
        metrics_of("needle in hay")
        assert metrics_of("flores:eng-fra") == metrics_of("flores") != metrics_of("qa")
    assert len(caplog.records) == 1
    assert "task 'needle in hay' is not known and is scored as 'qa' (em, f1" in caplog.text


def test_every_task_has_its_metrics_in_the_table() -> None:
    assert TASKS.keys() == METRICS_OF.keys()
    headlines = {name: metrics[0] for name, metrics in METRICS_OF.items()}
    assert [name for name in headlines if headlines[name] == "em"] == (
        ["squad", "squad2", "nq", "triviaqa", "hotpotqa", "qa", "counting"]
    )
    assert headlines["flores"] == "bleu" and headlines["qasper"] == "f1" and headlines["qmsum"] == "rouge_l"


def test_signatures_name_case_and_version() -> None:
    assert "case:mixed" in metrics.signature("bleu") and sacrebleu.__version__ in metrics.signature("bleu")
    assert "case:lc" in metrics.signature("bleu_other_case")
    assert "case:lc" in metrics.signature("bleu", bleu_lowercase=True)
    assert all(metrics.signature(metric) for task in metrics.METRICS_OF.values() for metric in task)

"""Scores of answers. Every metric is a sum of statistics over samples, and a function of that sum.

`sample_stats` gives the statistics of one answer, and `score_of` the score of their sum over any set of answers. For a
mean these are the answer's score and 1. For BLEU and chrF they are the counts of sacrebleu. So one bootstrap serves all
metrics. The last statistic is 0 only if the sum is over no answer.

Shapes: [..., K] are sums of the K statistics of a metric.
"""

from __future__ import annotations

import logging
import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from arc_ds.evaluation.task import Metric

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_SHORT_ANSWER: tuple[Metric, ...] = ("em", "f1", "substring", "approx_em")
_LONG_ANSWER: tuple[Metric, ...] = ("f1", "em", "substring", "rouge_l")
_SUMMARY: tuple[Metric, ...] = ("rouge_l",)
_LONG_SUMMARY: tuple[Metric, ...] = ("rouge_l", "f1")
_TRANSLATION: tuple[Metric, ...] = ("bleu", "chrf", "bleu_other_case")

# The first metric of a task is its headline.
METRICS_OF: dict[str, tuple[Metric, ...]] = {
    **dict.fromkeys(("squad", "squad2", "nq", "triviaqa", "hotpotqa", "qa"), _SHORT_ANSWER),
    **dict.fromkeys(("narrativeqa", "qasper"), _LONG_ANSWER),
    **dict.fromkeys(("cnn", "xsum", "summary"), _SUMMARY),
    **dict.fromkeys(("govreport", "qmsum"), _LONG_SUMMARY),
    **dict.fromkeys(("flores", "translation"), _TRANSLATION),
    "needle": ("substring", "em"),
    "multi_needle": ("substring", "em", "f1"),
    "variables": ("substring", "em", "f1"),
    "counting": ("em",),
}
FALLBACK = "qa"


def metrics_of(task: str) -> tuple[Metric, ...]:
    """The metrics of a task, headline first. An unknown task has those of `FALLBACK`, and a warning says so.

    task: a name in `METRICS_OF`, with or without a variant after a colon: "flores:eng-fra".
    """
    family = task.partition(":")[0]
    if family not in METRICS_OF:
        _warn_unknown(task)
    return METRICS_OF.get(family, METRICS_OF[FALLBACK])


@cache  # one warning for each task
def _warn_unknown(task: str) -> None:
    logger.warning(
        "task %r is not known and is scored as %r (%s). To choose the metrics, write another task into the lines: %s.",
        *(task, FALLBACK, ", ".join(METRICS_OF[FALLBACK]), ", ".join(METRICS_OF)),
    )


class Answer(NamedTuple):
    """The inputs of a metric for one sample.

    task: name of the task: F1 has variants.
    prediction: the answer.
    references: all accepted answers; at least one.
    nll: {"nats", "tokens"} of the first reference, or None.
    """

    task: str
    prediction: str
    references: Sequence[str]
    nll: Mapping[str, float] | None = None


@lru_cache(4096)  # metrics share the texts of a sample
def normalize_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, without ASCII punctuation and articles, single spaces."""
    text = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def exact_match(prediction: str, reference: str) -> float:
    """1 if both are equal after normalisation, else 0 (SQuAD)."""
    return float(normalize_answer(prediction) == normalize_answer(reference))


def approx_em(prediction: str, reference: str) -> float:
    """1 if the normalised reference's words follow each other in the normalised prediction, else 0."""
    return float(f" {normalize_answer(reference)} " in f" {normalize_answer(prediction)} ")


def f1(prediction: str, reference: str) -> float:
    """F1 of the bags of normalised words (SQuAD 1.1). It is 0 if both are empty."""
    predicted, wanted = normalize_answer(prediction).split(), normalize_answer(reference).split()
    num_same = (Counter(predicted) & Counter(wanted)).total()
    if num_same == 0:
        return 0.0
    precision, recall = num_same / len(predicted), num_same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def f1_hotpotqa(prediction: str, reference: str) -> float:
    """HotpotQA's F1: 0 if one side is "yes", "no" or "noanswer" and the other side is not the same."""
    both = {normalize_answer(prediction), normalize_answer(reference)}
    return 0.0 if len(both) > 1 and both & {"yes", "no", "noanswer"} else f1(prediction, reference)


def exact_match_squad2(prediction: str, reference: str) -> float:
    """SQuAD 2.0's exact match: silence and "unanswerable" both answer an unanswerable question."""
    return exact_match(_squad2_answer(prediction), _squad2_answer(reference))


def f1_squad2(prediction: str, reference: str) -> float:
    """SQuAD 2.0's F1: 1 if both sides give no answer (see `exact_match_squad2`)."""
    both = _squad2_answer(prediction), _squad2_answer(reference)
    return f1(*both) if any(both) else 1.0


def _squad2_answer(text: str) -> str:
    """The normalised answer; empty for "unanswerable", the reference of our reader."""
    text = normalize_answer(text)
    return "" if text == "unanswerable" else text


def substring(prediction: str, reference: str) -> float:
    """DrQA's has-answer: 1 if the reference's tokens follow each other in the prediction's, else 0.

    Tokens are lowercase runs of letters, digits and marks, and single other characters, after Unicode NFD. A reference
    without tokens is in every prediction.
    """
    wanted = _drqa_tokens(reference)
    return float(not wanted or f" {' '.join(wanted)} " in f" {' '.join(_drqa_tokens(prediction))} ")


@lru_cache(4096)
def _drqa_tokens(text: str) -> list[str]:
    return [token.lower() for token in _drqa_pattern().findall(unicodedata.normalize("NFD", text))]


@cache
def _drqa_pattern() -> Any:
    import regex

    return regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L of `rouge-score` with its stemmer: F-measure of the longest common subsequence of words."""
    predicted, wanted = _rouge_tokens(prediction), _rouge_tokens(reference)
    num_common = _common_length(predicted, wanted)
    if num_common == 0:
        return 0.0
    precision, recall = num_common / len(predicted), num_common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _common_length(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence. Each row of the usual table is one integer, a bit for each column.

    Source: Crochemore et al., "A fast and practical bit-vector algorithm for the longest common subsequence problem"
    (2001). `rouge-score` fills the table cell by cell and takes 25 times as long for texts of 600 words.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    whole = (1 << len(one)) - 1
    row = whole
    for word in other:
        matched = row & places.get(word, 0)
        row = (row + matched | row - matched) & whole
    return len(one) - row.bit_count()


@lru_cache(1024)
def _rouge_tokens(text: str) -> list[str]:
    from rouge_score.tokenize import tokenize

    return list(tokenize(text, _stemmer()))


@cache
def _stemmer() -> SimpleNamespace:
    """The stemmer of `rouge-score`, which remembers its words."""
    from nltk.stem.porter import PorterStemmer

    return SimpleNamespace(stem=lru_cache(1 << 16)(PorterStemmer().stem))


@cache
def _corpus_metric(name: str, lowercase: bool) -> Any:
    from sacrebleu.metrics import BLEU, CHRF

    return CHRF() if name == "chrf" else BLEU(lowercase=lowercase, force=True)


def _sacrebleu_counts(name: str, lowercase: bool, answer: Answer) -> tuple[float, ...]:
    """The sufficient statistics of sacrebleu, and 1."""
    references = [[reference] for reference in answer.references]
    (counts,) = _corpus_metric(name, lowercase)._extract_corpus_statistics([answer.prediction], references)
    return (*counts, 1)


def sample_stats(metric: Metric, answer: Answer, *, bleu_lowercase: bool = False) -> tuple[float, ...]:
    """The statistics of one answer, [K]: the maximum over its references, or counts.

    metric: its name. BLEU takes all references at once, as sacrebleu does.
    bleu_lowercase: case of "bleu"; "bleu_other_case" has the other one.
    """
    if metric == "nll":
        assert answer.nll is not None
        return answer.nll["nats"], answer.nll["tokens"]
    if metric in ("bleu", "bleu_other_case"):
        return _sacrebleu_counts("bleu", bleu_lowercase == (metric == "bleu"), answer)
    if metric == "chrf":
        return _sacrebleu_counts("chrf", False, answer)
    score = _MEANS_OF_TASK.get((answer.task.partition(":")[0], metric), _MEANS[metric])
    return max(score(answer.prediction, reference) for reference in answer.references), 1.0


_MEANS: dict[str, Callable[[str, str], float]] = {
    "em": exact_match,
    "f1": f1,
    "approx_em": approx_em,
    "substring": substring,
    "rouge_l": rouge_l,
}
_MEANS_OF_TASK: dict[tuple[str, str], Callable[[str, str], float]] = {
    ("hotpotqa", "f1"): f1_hotpotqa,
    ("squad2", "f1"): f1_squad2,
    ("squad2", "em"): exact_match_squad2,
}


def score_of(metric: Metric, sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """The scores of sums of statistics, [..., K] to [...]: points of 100, or nats per token for "nll".

    A sum over no answer has the score NaN.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        if metric in ("bleu", "bleu_other_case"):
            scores = _bleu(sums[..., :-1])
        elif metric == "chrf":
            scores = _chrf(sums[..., :-1])
        else:
            scores = sums[..., 0] / sums[..., 1] * (1.0 if metric == "nll" else 100.0)
        return np.where(sums[..., -1] > 0, scores, np.nan)


def is_mean(metric: Metric) -> bool:
    """Whether the score is a mean over answers or over tokens, so that its standard error has a closed form."""
    return metric not in ("bleu", "bleu_other_case", "chrf")


def bounds_of(metric: Metric) -> tuple[float, float]:
    """The smallest and the largest score."""
    return 0.0, math.inf if metric == "nll" else 100.0


def _bleu(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """BLEU of sacrebleu's ten counts (lengths of system and reference, four of matches, four of n-grams).

    The smoothing is sacrebleu's "exp": the k-th order without a match counts as 2**-k matches.
    """
    lengths, matches, totals = counts[..., :2], counts[..., 2:6], counts[..., 6:10]
    num_smoothed = np.cumsum(matches == 0, axis=-1)
    smoothed = np.where(matches == 0, 0.5**num_smoothed, matches)
    precisions = np.where(totals > 0, 100.0 * smoothed / totals, 0.0)
    penalty = np.exp(np.minimum(0.0, 1 - lengths[..., 1] / lengths[..., 0]))
    scores = penalty * np.exp(np.log(precisions).sum(axis=-1) / 4)
    return np.where(matches.any(axis=-1), scores, 0.0)


def _chrf(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """chrF2 of sacrebleu's counts: for each of six orders the n-grams of system and reference, and the matches."""
    system, reference, matches = np.moveaxis(counts.reshape(*counts.shape[:-1], 6, 3), -1, 0)
    is_counted = (system > 0) & (reference > 0)
    num_counted = is_counted.sum(axis=-1)
    precision = np.where(is_counted, matches / system, 0.0).sum(axis=-1) / num_counted
    recall = np.where(is_counted, matches / reference, 0.0).sum(axis=-1) / num_counted
    scores = 100 * (5 * precision * recall / (4 * precision + recall))
    return np.where((num_counted > 0) & (precision + recall > 0), scores, 0.0)


def signature(metric: Metric, *, bleu_lowercase: bool = False) -> str:
    """The settings and library version of a metric, for tables and `run.json`."""
    if metric in ("bleu", "bleu_other_case", "chrf"):
        found = _corpus_metric(metric[:4], metric != "chrf" and bleu_lowercase == (metric == "bleu"))
        return str(found.get_signature().format())
    return _SIGNATURES[metric]


_SIGNATURES: dict[str, str] = {
    "em": "equal after SQuAD's normalisation, maximum over references",
    "f1": "SQuAD's F1 of words (HotpotQA's and SQuAD 2.0's rules for their tasks), maximum over references",
    "approx_em": "normalised reference within the normalised prediction, maximum over references",
    "substring": "DrQA's has-answer, maximum over references",
    "rouge_l": "rouge-score rougeL, stemmer, F-measure, maximum over references",
    "nll": "nats per token of the first reference; lower is better",
}

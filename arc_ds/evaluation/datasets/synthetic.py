"""Synthetic sets of our own making: needles in a haystack, variables to track, things to count.

The path of such a set is a YAML file with the fields of `HaystackSpec`, such as `{words: [1000, 4000], samples: 20}`.
The samples follow from this file alone, and from the text folder if it names one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

from tqdm import tqdm

from arc_ds.config.decode import decode
from arc_ds.config.ranges import Count, Positive, Range
from arc_ds.config.tree import parse_yaml
from arc_ds.data.order.randomness import permutation, random_words
from arc_ds.errors import ConfigError, DataError
from arc_ds.evaluation.protocol import Protocol
from arc_ds.evaluation.sample import EvalSample
from arc_ds.evaluation.task import EvalTask
from arc_ds.system.user_files import read_user_text

_ADJECTIVES, _NOUNS, _VERBS, _TIMES = (
    line.split(", ")
    for line in (
        "amber, broad, calm, dusty, early, faded, gentle, hollow, ivory, jagged, kindly, lonely, mossy, narrow, old",
        "bridge, cellar, door, engine, ferry, garden, harbor, inn, kiln, lantern, meadow, mill, pier, quarry, river",
        "passes, faces, follows, shades, touches, crosses, recalls, greets",
        "at dawn, in winter, by noon, after the rain, in late summer, before dusk, on market days, in fog",
    )
)
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True, kw_only=True)
class HaystackSpec:
    """The parameters of a synthetic set.

    words: lengths of the documents in words, needles included. A document ends with the sentence that exceeds it.
    samples: samples of each length.
    seed: other seeds give other documents and needles.
    needles: facts of `multi_needle`, variables of each chain of `variables`, highest count of `counting`. At most 225,
        the number of names.
    text: folder with text files (`*.txt`) that make the documents; relative to the file. None: generated sentences.
    """

    words: tuple[Annotated[int, Range(at_least=50)], ...] = (1000,)
    samples: Positive = 20
    seed: Count = 0
    needles: Annotated[int, Range(at_least=1, below=226)] = 4
    text: str | None = None


class Haystack(NamedTuple):
    """The hidden sentences of a sample, with question and answer.

    needles: sentences to hide, in their order.
    question: the question about them.
    answer: its answer.
    """

    needles: tuple[str, ...]
    question: str
    answer: str


def read_haystacks(path: Path, protocol: Protocol, *, kind: str) -> list[EvalSample]:
    """Make the samples that a YAML file describes. Raises ConfigError or DataError if it or its text is invalid."""
    remedy = "Pass a YAML file such as {words: [1000, 4000], samples: 20}."
    spec = decode(parse_yaml(read_user_text(path, DataError, remedy=remedy), str(path)), HaystackSpec)
    filler = None if spec.text is None else read_filler(path.parent / spec.text)
    return make_haystacks(kind, spec, filler)


def make_haystacks(kind: str, spec: HaystackSpec, filler: Sequence[str] | None = None) -> list[EvalSample]:
    """The samples of a set, by length.

    kind: "needle", "multi_needle", "variables" or "counting".
    spec: see `HaystackSpec`. `text` is not read.
    filler: sentences of the documents; None: generated ones.

    Raises ConfigError if the needles alone are longer than a document.
    """
    drawn = [(num_words, idx) for num_words in spec.words for idx in range(spec.samples)]
    progress = tqdm(drawn, desc=f"make {kind}", unit=" samples", delay=2, mininterval=1, leave=False)
    return [_sample(kind, spec, num_words, idx, filler) for num_words, idx in progress]


def read_filler(folder: Path) -> list[str]:
    """The sentences of the text files of a folder, sorted by name. Raises DataError if there are none."""
    texts = [read_user_text(path, DataError, remedy="Remove it.") for path in sorted(folder.rglob("*.txt"))]
    sentences = [" ".join(part.split()) for text in texts for part in _SENTENCE_END.split(text) if part.strip()]
    if not sentences:
        raise DataError(
            f"{folder}: expected text files (*.txt), found none with text. Leave out `text` to generate it."
        )
    return sentences


def _sample(kind: str, spec: HaystackSpec, num_words: int, idx: int, filler: Sequence[str] | None) -> EvalSample:
    key = (spec.seed, kind, num_words, idx)
    haystack = _KINDS[kind](spec.needles, *key)
    room = num_words - sum(_count(needle) for needle in haystack.needles)
    if room < 0:
        raise ConfigError(
            f"{kind}: {len(haystack.needles)} needles exceed {num_words} words. Raise `words` or lower `needles`."
        )
    hay = _generated(room, *key) if filler is None else _cut(filler, room, *key)
    if kind == "needle":
        share = idx / max(spec.samples - 1, 1)
        places = [round(share * len(hay))]
        where = f"-depth{round(100 * share)}"
    else:
        places = sorted(int(word) % (len(hay) + 1) for word in random_words(len(haystack.needles), *key, "places"))
        where = f"-needles{spec.needles}"
    for place, needle in zip(reversed(places), reversed(haystack.needles), strict=True):
        hay.insert(place, needle)
    source = "" if filler is None else "-text"
    return EvalSample(
        id=f"{kind}-words{num_words}-seed{spec.seed}{where}{source}-{idx:04d}",
        task=kind,
        passages=(" ".join(hay),),
        references=(haystack.answer,),
        question=haystack.question,
        cluster=f"{kind}-words{num_words}-seed{spec.seed}{source}-{idx:04d}",
    )


def _generated(num_words: int, *key: int | str) -> list[str]:
    """Generated sentences of at least `num_words` words in total."""
    sentences: list[str] = []
    draws = iter(random_words(6 * (num_words // 8 + 2), *key, "hay").tolist())
    total = 0
    while total < num_words:
        first, noun, verb, second, other, time = (next(draws) for _ in range(6))
        sentence = (
            f"The {_of(_ADJECTIVES, first)} {_of(_NOUNS, noun)} {_of(_VERBS, verb)} "
            f"the {_of(_ADJECTIVES, second)} {_of(_NOUNS, other)} {_of(_TIMES, time)}."
        )
        sentences.append(sentence)
        total += _count(sentence)
    return sentences


def _cut(filler: Sequence[str], num_words: int, *key: int | str) -> list[str]:
    """Consecutive sentences of at least `num_words` words in total, from a drawn one on; the first follows the last."""
    start = int(random_words(1, *key, "start")[0]) % len(filler)
    sentences: list[str] = []
    total = 0
    while total < num_words:
        sentence = filler[(start + len(sentences)) % len(filler)]
        sentences.append(sentence)
        total += _count(sentence)
    return sentences


def _facts(count: int, *key: int | str) -> tuple[list[str], list[str]]:
    """Distinct names and 7-digit numbers."""
    order = permutation(len(_ADJECTIVES) * len(_NOUNS), *key, "names")[:count].tolist()
    names = [f"{_ADJECTIVES[idx % len(_ADJECTIVES)]} {_NOUNS[idx // len(_ADJECTIVES)]}" for idx in order]
    return names, _numbers(count, *key)


def _fact(name: str, number: str) -> str:
    return f"The secret number of the {name} is {number}."


def _numbers(count: int, *key: int | str) -> list[str]:
    """Distinct 7-digit numbers."""
    drawn: dict[int, None] = {}
    for word in random_words(2 * count + 64, *key, "numbers").tolist():
        drawn.setdefault(1_000_000 + word % 9_000_000)
    return [str(number) for number in list(drawn)[:count]]


def _hide_needle(_: int, *key: int | str) -> Haystack:
    (name,), (number,) = _facts(1, *key)
    return Haystack((_fact(name, number),), f"What is the secret number of the {name}?", number)


def _hide_needles(count: int, *key: int | str) -> Haystack:
    names, numbers = _facts(count, *key)
    order = permutation(count, *key, "question").tolist()  # the order of the question is not that of the text
    needles = tuple(map(_fact, names, numbers))
    asked = ", ".join(f"the {names[idx]}" for idx in order)
    question = f"What are the secret numbers of {asked}? Give them in this order, with commas between them."
    return Haystack(needles, question, ", ".join(numbers[idx] for idx in order))


def _hide_variables(count: int, *key: int | str) -> Haystack:
    """Two chains of assignments, shuffled into each other. The question is about the first one."""
    letters = permutation(len(_LETTERS) ** 2, *key, "letters")[: 2 * count].tolist()
    names = [f"{_LETTERS[idx // len(_LETTERS)]}{_LETTERS[idx % len(_LETTERS)]}" for idx in letters]
    values = _numbers(2, *key)
    chains = [_chain(names[:count], values[0]), _chain(names[count:], values[1])]
    turns = sorted(range(2 * count), key=random_words(2 * count, *key, "turns").tolist().__getitem__)
    needles = tuple(chains[turn >= count].pop(0) for turn in turns)
    question = f"Which variables have the value {values[0]}? Give them in the order of their assignment, with commas."
    return Haystack(needles, question, ", ".join(names[:count]))


def _chain(names: Sequence[str], value: str) -> list[str]:
    sources = (value, *(f"the value of variable {name}" for name in names))
    return [f"Variable {name} gets {source}." for name, source in zip(names, sources, strict=False)]


def _hide_rings(highest: int, *key: int | str) -> Haystack:
    """One bell that rings 1 to `highest` times among another's rings."""
    own, others = (1 + int(word) % highest for word in random_words(2, *key, "counts"))
    rings = ["The bell of Tarn rings."] * own + ["The bell of Orm rings."] * others
    order = permutation(len(rings), *key, "rings").tolist()
    question = "How many times does the bell of Tarn ring? Answer with a number in digits."
    return Haystack(tuple(rings[idx] for idx in order), question, str(own))


def _of(choices: Sequence[str], word: int) -> str:
    return choices[word % len(choices)]


def _count(sentence: str) -> int:
    return len(sentence.split())


_KINDS: dict[str, Callable[..., Haystack]] = {
    "needle": _hide_needle,
    "multi_needle": _hide_needles,
    "variables": _hide_variables,
    "counting": _hide_rings,
}

TASKS = tuple(
    EvalTask(
        name=kind,
        read=partial(read_haystacks, kind=kind),
        layout="long",
        labels=("Text", "Question", "Answer"),
        instruction="Answer the question about the text. Give the answer alone.",
        stop=("\n",),
    )
    for kind in _KINDS
)

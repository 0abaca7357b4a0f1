"""Synthetic sets: the answer follows from the document, and the document from the parameters."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from arc_ds.errors import ConfigError, DataError
from arc_ds.evaluation.datasets import TASKS
from arc_ds.evaluation.datasets.synthetic import HaystackSpec, make_haystacks
from arc_ds.evaluation.protocol import CLEAN

KINDS = ("needle", "multi_needle", "variables", "counting")
SPEC = HaystackSpec(words=(200, 500), samples=6, needles=5, seed=1)


def solve(kind: str, question: str, document: str) -> str:
    """The answer as a reader finds it, by rules of its own."""
    if kind == "counting":
        return str(document.count("The bell of Tarn rings."))
    if kind == "variables":
        known = {re.findall(r"\d{7}", question)[0]}
        found = []
        for name, source in re.findall(r"Variable (\w+) gets (?:the value of variable )?(\w+)\.", document):
            if source in known:
                known.add(name)
                found.append(name)
        return ", ".join(found)
    numbers = dict(re.findall(r"The secret number of (the \w+ \w+) is (\d+)\.", document))
    return ", ".join(numbers[name] for name in re.findall(r"the (?!secret)\w+ \w+(?=[,.?])", question))


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_follows_from_the_document(kind: str) -> None:
    samples = make_haystacks(kind, SPEC)
    assert len(samples) == 12 and len({sample.references for sample in samples}) > 2
    for sample in samples:
        assert solve(kind, sample.question or "", sample.passages[0]) == sample.references[0]
        assert sample.references[0] not in (sample.question or "")


def test_the_most_needles_have_names_of_their_own() -> None:
    (sample,) = make_haystacks("multi_needle", HaystackSpec(words=(2500,), samples=1, needles=225))
    assert solve("multi_needle", sample.question or "", sample.passages[0]) == sample.references[0]


@pytest.mark.parametrize("kind", KINDS)
def test_documents_have_their_length_and_follow_from_the_parameters(kind: str) -> None:
    samples = make_haystacks(kind, SPEC)
    assert samples == make_haystacks(kind, SPEC) != make_haystacks(kind, HaystackSpec(seed=2))
    assert len({sample.id for sample in samples}) == 12
    for sample, words in zip(samples, [200] * 6 + [500] * 6, strict=True):
        assert words <= len(sample.passages[0].split()) < words + 12
        assert sample.id.startswith(f"{kind}-words{words}-seed1-")
    # One more sample or length leaves the others as they are; only the depths of a single needle are spread anew.
    if kind != "needle":
        assert samples == make_haystacks(kind, HaystackSpec(words=(200, 500, 900), samples=6, needles=5, seed=1))[:12]


def test_a_single_needle_stands_at_its_depth() -> None:
    for sample in make_haystacks("needle", HaystackSpec(words=(1000,), samples=5)):
        before, _, _ = sample.passages[0].partition("The secret number")
        depth = int(re.findall(r"depth(\d+)", sample.id)[0])
        assert abs(len(before.split()) / 1000 - depth / 100) < 0.02
    assert depth == 100


def test_a_yaml_file_describes_a_set_over_a_text_folder(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("One ship  sails. Two ships\nwait! Do they?", encoding="utf-8")
    path = tmp_path / "spec.yaml"
    path.write_text("{words: [60], samples: 2, text: texts}", encoding="utf-8")
    samples = TASKS["needle"].read(path, CLEAN)
    text = re.sub(r"The secret number of the \w+ \w+ is \d+\. ?", "", samples[0].passages[0])
    assert set(re.split(r"(?<=[.!?]) ", text.strip())) == {"One ship sails.", "Two ships wait!", "Do they?"}
    assert samples[1].id == "needle-words60-seed0-depth100-text-0001"
    (tmp_path / "texts" / "a.txt").write_text(" ", encoding="utf-8")
    with pytest.raises(DataError, match="expected text files"):
        TASKS["needle"].read(path, CLEAN)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{wrds: [100]}", "wrds"),
        ("{words: [10]}", "50 or more"),
        ("{words: [50], needles: 40}", "80 needles exceed 50 words. Raise `words`"),
        ("{needles: 226}", "less than 226"),
    ],
)
def test_bad_specs_are_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=words):
        TASKS["variables"].read(path, CLEAN)

"""Reader of TriviaQA. Its questions come with whole documents; the reader cuts passages that contain the answer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from arc_ds.errors import DataError
from arc_ds.shards.building.question import Question, distinct
from arc_ds.system.user_files import check_downloaded

_WORD = re.compile(r"\w+")


def read_triviaqa(content: Any, *, evidence: Path, passage_words: int, max_passages: int) -> Iterator[Question]:
    """The questions of a file of the reading-comprehension set, with passages of its documents.

    A question keeps the passages that contain its answer or an alias. Passages that share the most words with the
    question come first. A question without such a passage gets the reason `no_evidence`. Raises DataError if a
    document is missing.

    evidence: the folder with `wikipedia` and `web`.
    passage_words: see `converters.ConvertOptions`.
    max_passages: see `converters.ConvertOptions`.
    """
    for entry in content["Data"]:
        answer = entry["Answer"]
        answers = distinct([answer["Value"], *answer.get("Aliases", []), *answer.get("HumanAnswers", [])])
        question = entry["Question"].strip()
        paths = [
            evidence / folder / page["Filename"]
            for kind, folder in (("EntityPages", "wikipedia"), ("SearchResults", "web"))
            for page in entry.get(kind) or []
        ]
        passages = _best([p for path in paths for p in _passages(path, passage_words)], question, answers)
        yield Question(
            name=entry["QuestionId"],
            text=question,
            passages=tuple(passages[:max_passages]),
            answers=answers,
            reason=None if passages else "no_evidence",
        )


def _passages(path: Path, passage_words: int) -> list[str]:
    """The lines of a document, joined into passages of about `passage_words` words; longer lines are cut."""
    check_downloaded(path, DataError)
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}. Unpack TriviaQA's evidence and pass its folder (--evidence)."
        ) from error
    passages: list[list[str]] = [[]]
    for line in text.splitlines():
        words = line.split()
        for start in range(0, len(words), passage_words):
            piece = words[start : start + passage_words]
            if passages[-1] and sum(len(part.split()) for part in passages[-1]) + len(piece) > passage_words:
                passages.append([])
            passages[-1].append(" ".join(piece))
    return ["\n".join(parts) for parts in passages if parts]


def _best(passages: Sequence[str], question: str, answers: Sequence[str]) -> list[str]:
    """The passages that contain an answer, ordered by the number of words that they share with the question."""
    holds_answer = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, answers))})(?!\w)", re.IGNORECASE)
    fitting = [passage for passage in dict.fromkeys(passages) if answers and holds_answer.search(passage)]
    asked = _words(question)
    # stable sort: on a tie, earlier documents come first
    return sorted(fitting, key=lambda passage: -len(asked & _words(passage)))


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.casefold()))

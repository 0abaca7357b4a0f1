"""Reader of TriviaQA. Its questions come with whole documents; the reader cuts passages that contain the answer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from arc_ds.errors import DataError
from arc_ds.shards.building.question import Question, distinct
from arc_ds.shards.building.question_rows import (
    TRIVIAQA_DOCUMENTS,
    answer_texts,
    is_question_row,
    nested,
    read_question,
    rows_of,
)
from arc_ds.system.user_files import check_downloaded, decode_user_text, without_mark

_WORD = re.compile(r"\w+")


def read_triviaqa(content: Any, *, evidence: Path, passage_words: int, max_passages: int) -> Iterator[Question]:
    """The questions of a file of the reading-comprehension set, or the one of a row, with passages of its documents.

    A question keeps the passages that contain its answer or an alias. Passages that share the most words with the
    question come first. A question without such a passage gets the reason `no_evidence`. Raises DataError if a
    document is missing.

    evidence: the folder with `wikipedia` and `web`.
    passage_words: see `converters.ConvertOptions`.
    max_passages: see `converters.ConvertOptions`.
    """
    for entry in [content] if is_question_row(content) else content["Data"]:
        if "Question" in entry:
            question = _original(entry, evidence)
        elif any(name in nested(entry) for name in TRIVIAQA_DOCUMENTS):
            question = _row(nested(entry))
        else:
            yield read_question(entry)
            continue
        pieces = [piece for document in question.passages for piece in _pieces(document, passage_words)]
        passages = _best(pieces, question.text, question.answers)
        yield replace(question, passages=tuple(passages[:max_passages]), reason=None if passages else "no_evidence")


def _original(entry: Any, evidence: Path) -> Question:
    """A question of an original file, with its documents as passages."""
    answer = entry["Answer"]
    paths = [
        evidence / folder / page["Filename"]
        for kind, folder in (("EntityPages", "wikipedia"), ("SearchResults", "web"))
        for page in entry.get(kind) or []
    ]
    return Question(
        name=entry["QuestionId"],
        text=entry["Question"].strip(),
        passages=tuple(map(_document, paths)),
        answers=distinct([answer["Value"], *answer.get("Aliases", []), *answer.get("HumanAnswers", [])]),
    )


def _row(entry: Any) -> Question:
    """A question of a row of the Hub, with its documents as passages."""
    return Question(
        name=entry["question_id"],
        text=entry["question"].strip(),
        passages=tuple(
            without_mark(page[text])
            for field, text in TRIVIAQA_DOCUMENTS.items()
            for page in rows_of(entry.get(field) or [])
            if page.get(text)
        ),
        answers=distinct(answer_texts(entry["answer"])),
    )


def _document(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}. Unpack TriviaQA's evidence and pass its folder (--evidence)."
        ) from error
    check_downloaded(path, DataError)
    return decode_user_text(raw, str(path), DataError, remedy="Unpack it again.", errors="replace")


def _pieces(text: str, passage_words: int) -> list[str]:
    """The lines of a document, joined into passages of about `passage_words` words; longer lines are cut."""
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

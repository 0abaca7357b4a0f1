"""NarrativeQA: questions on whole books and film scripts, with two answers each."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from arc_ds.errors import DataError
from arc_ds.evaluation.datasets.long_context import long_task, read_long
from arc_ds.evaluation.datasets.reading import Entry, Layout, make_samples
from arc_ds.evaluation.protocol import Protocol
from arc_ds.evaluation.sample import EvalSample
from arc_ds.system.user_files import decode_user_text, read_user_bytes, read_user_text

_QUESTIONS = "qaps.csv"
_WANTED = ("document_id", "set", "question", "answer1", "answer2")
_STORIES = ("tmp", "stories")
_REMEDY = "Download the story (download_stories.sh of the data set), or remove its questions."


def read_narrativeqa(path: Path, protocol: Protocol, **options: Any) -> list[EvalSample]:
    """The questions of an original folder, or of what `read_long` reads.

    An original folder holds `qaps.csv`, of which the set "valid" is read, and `DOCUMENT_ID.content` in `tmp/` or
    `stories/`.

    options: arguments of `read_long`.
    """
    if path.is_dir() and (path / _QUESTIONS).is_file():
        return make_samples("narrativeqa", _folder(path), merge=protocol.qasper_by_question, by_passage=True)
    return read_long(path, protocol, **options)


def _hub(fields: Mapping[str, Any]) -> Iterator[Entry]:
    document = fields["document"]
    yield Entry(
        question=fields["question"]["text"],
        passages=(document["text"],),
        answers=tuple(answer["text"] for answer in fields["answers"]),
        cluster=document["id"],
    )


def _folder(folder: Path) -> Iterator[tuple[str, Entry]]:
    path = folder / _QUESTIONS
    reader = csv.DictReader(io.StringIO(read_user_text(path, DataError, remedy="Download it again.")))
    if not set(_WANTED) <= set(reader.fieldnames or ()):
        raise DataError(f"{path}: found the fields {', '.join(reader.fieldnames or ())}; wanted {', '.join(_WANTED)}.")
    stories: dict[str, str] = {}
    for number, row in enumerate(reader, start=1):
        if row["set"] != "valid":
            continue
        name = row["document_id"]
        if name not in stories:
            stories[name] = _story(folder, name)
        answers = (row["answer1"], row["answer2"])
        entry = Entry(question=row["question"], passages=(stories[name],), answers=answers, cluster=name)
        yield f"{path}, question {number}", entry


def _story(folder: Path, name: str) -> str:
    paths = [folder / parent / f"{name}.content" for parent in _STORIES]
    path = next((path for path in paths if path.is_file()), paths[0])
    return decode_user_text(
        read_user_bytes(path, DataError, remedy=_REMEDY), str(path), DataError, remedy=_REMEDY, errors="replace"
    )


TASKS = (
    long_task(
        "narrativeqa",
        labels=("Story", "Question", "Answer"),
        instruction="Answer the question about the story with a few words, without an explanation.",
        layouts=(Layout(name="Hub", fields=("document", "question", "answers"), read=_hub),),
        read=read_narrativeqa,
    ),
)

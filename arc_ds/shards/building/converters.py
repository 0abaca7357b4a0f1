"""Converts the original files of question-answering data sets to fine-tuning records in JSONL."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from arc_ds.errors import DataError
from arc_ds.shards.building.converters_qa import read_drop, read_squad
from arc_ds.shards.building.converters_triviaqa import read_triviaqa
from arc_ds.shards.building.question import Question
from arc_ds.shards.records import encode_record, fine_tuning_record
from arc_ds.system.files import output, whole_file

FORMATS = ("squad", "drop", "triviaqa")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """Options of `convert_files`; all but `first_answer` apply to TriviaQA only.

    first_answer: keep only the main answer, for training. The other answers are for evaluation.
    evidence: folder of the documents. None: the folder `evidence` next to the folder of the file.
    passage_words: approximate number of words of the passages that documents are split into.
    max_passages: maximum number of passages of a question.
    """

    first_answer: bool = False
    evidence: Path | None = None
    passage_words: int = 150
    max_passages: int = 4

    def __post_init__(self) -> None:
        if self.passage_words < 1 or self.max_passages < 1:
            raise DataError(
                f"passage_words = {self.passage_words}, max_passages = {self.max_passages}: expected at least 1."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """The number of records written, and the number of questions left out for each reason."""

    records: int
    skipped: dict[str, int]


def convert_files(
    format_name: str,
    paths: Sequence[Path],
    out: Path,
    options: ConvertOptions | None = None,
    *,
    overwrite: bool = False,
) -> Conversion:
    """Convert files of one format to one JSONL file, with the questions in their original order.

    The write is atomic. Raises DataError if a file does not have the format, or if `out` exists and `overwrite` is
    false.
    """
    options = options or ConvertOptions()
    if format_name not in FORMATS:
        raise DataError(f"the format is {format_name!r}; expected one of {', '.join(FORMATS)}.")
    if out.exists() and not overwrite:
        raise DataError(f"{out} exists. Give another file, or overwrite=True (--overwrite) to replace it.")
    records = 0
    skipped: Counter[str] = Counter()
    with output(out), whole_file(out) as file:
        for path in paths:
            for question in _questions(format_name, path, options):
                if question.reason is not None:
                    skipped[question.reason] += 1
                    continue
                file.write(_encoded(question, path, options) + b"\n")
                records += 1
    return Conversion(records=records, skipped=dict(sorted(skipped.items())))


def _questions(format_name: str, path: Path, options: ConvertOptions) -> Iterator[Question]:
    """The questions of a file. Raises DataError if the file cannot be read or has another format."""
    readers: dict[str, Callable[[Any], Iterator[Question]]] = {
        "squad": read_squad,
        "drop": read_drop,
        "triviaqa": partial(
            read_triviaqa,
            evidence=options.evidence or path.absolute().parent.parent / "evidence",
            passage_words=options.passage_words,
            max_passages=options.max_passages,
        ),
    }
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}). Pass the original file, unpacked.") from error
    try:
        yield from readers[format_name](content)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path}: not of the format {format_name} ({what}). Pass its actual format.") from error


def _encoded(question: Question, path: Path, options: ConvertOptions) -> bytes:
    answers = question.answers[:1] if options.first_answer else question.answers
    record = {"passages": list(question.passages), "question": question.text, "answer": list(answers)}
    try:
        fine_tuning_record(record)
    except DataError as error:
        raise DataError(f"{path}, question {question.name}: {error}. Fix or remove it.") from error
    return encode_record(record)

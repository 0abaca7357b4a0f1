"""Converts question-answering data sets, original files or rows, to fine-tuning records in JSONL."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from arc_ds.errors import DataError
from arc_ds.shards.building.converters_qa import read_drop, read_rows, read_squad
from arc_ds.shards.building.converters_triviaqa import read_triviaqa
from arc_ds.shards.building.documents import LeftOutError, read_documents
from arc_ds.shards.building.inputs import find_inputs, input_file, read_batches
from arc_ds.shards.building.inputs_lines import read_whole
from arc_ds.shards.building.question import Question
from arc_ds.shards.building.question_rows import NAMES, ROW_FIELDS, RowError, is_question_row
from arc_ds.shards.records import encode_record, fine_tuning_record
from arc_ds.system.files import output, whole_file
from arc_ds.system.user_files import decode_user_text, parse_user_json_values, read_user_text

FORMATS = ("squad", "drop", "triviaqa", "rows")
_REMEDY = "Pass the original file of the data set, or its rows as JSON, JSON lines, Parquet or Arrow."
_MAX_BYTES = 1 << 40  # no limit: original files have one line


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

    paths: original files, files of rows (JSON array, JSON lines, Parquet, Arrow), and folders of files of rows.

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
    with output(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(out) as file:
            for path in paths:
                for question in _questions(format_name, path, options):
                    if question.reason is not None:
                        skipped[question.reason] += 1
                        continue
                    file.write(_encoded(question, path, options) + b"\n")
                    records += 1
    return Conversion(records=records, skipped=dict(sorted(skipped.items())))


def _questions(format_name: str, path: Path, options: ConvertOptions) -> Iterator[Question]:
    """The questions of a file or folder. Raises DataError if it cannot be read or has another format."""
    readers: dict[str, Callable[[Any], Iterator[Question]]] = {
        "squad": read_squad,
        "drop": read_drop,
        "triviaqa": partial(
            read_triviaqa,
            evidence=options.evidence or path.absolute().parent.parent / "evidence",
            passage_words=options.passage_words,
            max_passages=options.max_passages,
        ),
        "rows": read_rows,
    }
    is_empty = True
    for place, content in _contents(path):
        is_empty = False
        try:
            yield from readers[format_name](content)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            what = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{place}: not of the format {format_name} ({what}). Pass its actual format.") from error
        except RowError as error:
            raise DataError(f"{place}: {error}. Fix or remove it, or pass its actual format.") from error
    if is_empty:
        raise DataError(f"{path}: not of the format {format_name} (it holds no question). Pass its actual format.")


def _contents(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place and the content of each row of a file or folder, or of an original file as a whole."""
    if path.is_dir():
        files = find_inputs([path]).files
    else:
        file = input_file(path)
        files = () if file is None else (file,)
        if file is None:  # an original file may have any name
            yield from _json_contents(path, read_user_text(path, DataError, remedy=_REMEDY))
    for file in files:
        if file.kind in ("parquet", "arrow"):
            for batch in read_batches(file, columns=(*ROW_FIELDS, *NAMES), max_document_bytes=_MAX_BYTES):
                for number, parse in read_documents(file, batch, text_field="text", max_bytes=_MAX_BYTES):
                    try:
                        yield file.where(number), parse()
                    except LeftOutError as error:
                        raise DataError(f"{file.where(number)}: {error.fault}") from error
        else:
            raw = read_whole(file)
            text = decode_user_text(raw, str(file.path), DataError, remedy=_REMEDY, convert=file.convert)
            yield from _json_contents(file.path, text)


def _json_contents(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yield the place and the content of each row of a JSON array or of JSON lines, or of a whole JSON object."""
    number = 0
    for value in parse_user_json_values(text, str(path), DataError, remedy=_REMEDY):
        for content in value if isinstance(value, list) else [value]:
            number += 1
            is_row = isinstance(content, dict) and is_question_row(content)
            yield f"{path}, row {number}" if is_row else str(path), content


def _encoded(question: Question, path: Path, options: ConvertOptions) -> bytes:
    record = question.to_record(first_answer=options.first_answer)
    try:
        fine_tuning_record(record)
    except DataError as error:
        raise DataError(f"{path}, question {question.name}: {error}. Fix or remove it.") from error
    return encode_record(record)

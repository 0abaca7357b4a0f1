"""Reads data sets in the layouts in which people have them.

A file holds JSON objects: an array, lines, one object, or the rows of Parquet or Arrow. Each task names the layouts
that it knows. The fields of an object decide which one it has.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from arc_ds.errors import DataError
from arc_ds.evaluation.sample import EvalSample
from arc_ds.shards.building.batches import InputFile, Line, import_library
from arc_ds.shards.building.documents import LeftOutError, read_documents
from arc_ds.shards.building.inputs import input_file, read_batches
from arc_ds.shards.building.inputs_lines import read_whole, why_no_lines
from arc_ds.shards.building.question import distinct
from arc_ds.shards.building.question_rows import answer_texts, nested, rows_of, titled_passage
from arc_ds.system.user_files import (
    check_encodable,
    decode_user_text,
    library_reads,
    parse_user_json_values,
    read_user_text,
    without_mark,
    without_mark_in_names,
)

logger = logging.getLogger(__name__)

_REMEDY = "Pass a file of the data set: JSON, JSON lines, Parquet or Arrow."
_MAX_BYTES = 1 << 40  # no limit
_MAX_NAMED = 12  # fields in an error
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_SPLIT = re.compile(r"(?<![A-Za-z])(train|validation|valid|val|devtest|dev|test)(?![A-Za-z])")
_MAX_FIRST_LINE = 1 << 20  # bytes
QUESTIONS = ("question", "query")
_PASSAGES = ("passages", "passage", "context", "contexts", "ctxs", "positive_ctxs", "paragraphs", "documents")
_ANSWERS = ("answers", "answer")
_IDS = ("id", "_id", "query_id", "question_id", "qid", "example_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A question as its file states it.

    passages: see `EvalSample`; empty if the file has none. They are stripped, and blank ones ignored.
    answers: accepted answers, the main one first.
    question: see `EvalSample`.
    id: the data set's own id; empty if it has none. Numbers become texts, here and in the next two fields.
    cluster: see `EvalSample`; empty: see `make_samples`.
    group: see `EvalSample`.
    instruction: see `EvalSample`.
    """

    passages: tuple[str, ...]
    answers: tuple[str, ...]
    question: str | None = None
    id: str = ""
    cluster: str = ""
    group: str = ""
    instruction: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A layout of objects.

    name: its name in errors.
    fields: the fields that mark it; "a|b" is either of two.
    read: yields the entries of an object.
    """

    name: str
    fields: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Iterable[Entry]]

    def fits(self, fields: Mapping[str, Any]) -> bool:
        """Whether an object has all fields of the layout."""
        return all(any(name in fields for name in field.split("|")) for field in self.fields)


def read_entries(layouts: Sequence[Layout], path: Path) -> Iterator[tuple[str, Entry]]:
    """Yield the place and the content of each question.

    path: a file, a folder, or a pattern such as `validation-*.parquet`.
    layouts: the known layouts. The first one that fits an object reads it.

    Raises DataError, with the fields found and the fields wanted, if none fits, or if its values have other types.
    """
    for place, content in read_objects(path):
        fields = _unflattened(content)
        layout = next((layout for layout in layouts if layout.fits(fields)), None)
        if layout is None:
            wanted = "; ".join(f"{layout.name}: {_words(layout.fields)}" for layout in layouts)
            raise DataError(
                f"{place}: found the fields {_found(fields)}; wanted those of one layout ({wanted}). {_REMEDY}"
            )
        try:
            for entry in layout.read(fields):
                yield place, _checked(entry)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            what = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{place}: not in the layout {layout.name} ({what}); found {_found(fields)}.") from error
        except DataError as error:
            remedy = "" if str(error).endswith(".") else ". Fix or remove it."
            raise DataError(f"{place}, layout {layout.name}: {error}{remedy}") from error


def _checked(entry: Entry) -> Entry:
    """The entry, with null as an empty text. Raises DataError if a field holds a value of another type."""
    texts = {"question": (entry.question,), "passages": entry.passages, "answers": entry.answers}
    for name, values in texts.items():
        if wrong := [value for value in values if not isinstance(value, str | None)]:
            raise DataError(f"expected texts as {name}, got {type(wrong[0]).__name__}")
    names = {name: _name(name, getattr(entry, name)) for name in ("id", "cluster", "group")}
    passages, answers = (tuple(text or "" for text in values) for values in (entry.passages, entry.answers))
    return replace(entry, passages=passages, answers=answers, **names)


def _name(field: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"expected the {field} as a text or a number, got {type(value).__name__}")


def _unflattened(content: dict[str, Any]) -> dict[str, Any]:
    """The fields, with those of a flattened table (`answers.text`) as objects. Other names may hold dots (Qasper's)."""
    is_table = all(part.isidentifier() for name in content for part in name.split("."))
    return nested(content) if is_table else content


def make_samples(
    task: str,
    entries: Iterable[tuple[str, Entry]],
    *,
    merge: bool = False,
    by_passage: bool = False,
    only_first: bool = False,
) -> list[EvalSample]:
    """The samples of a task, in the order of their entries.

    Entries are left out if they have no answer, or if they have passages and all are blank. Warnings count them. An
    entry without an id gets a hash of its question and first passage; if an earlier one has the same hash, a number
    follows.

    task: name of the task.
    merge: entries with the same id, question and passages are one sample with the references of all.
    by_passage: the default cluster is the first passage; otherwise it is the id.
    only_first: keep the first answer alone.

    Raises DataError if nothing is left, if an id occurs twice, or if a text cannot be encoded as UTF-8.
    """
    samples: dict[str, EvalSample] = {}
    places: dict[str, str] = {}
    texts: dict[str, _Passage] = {}  # long documents with many questions are held once
    repeats: Counter[str] = Counter()
    num_entries = num_unanswered = num_blank = 0
    place = ""
    for place, entry in tqdm(entries, desc=f"read {task}", unit=" questions", delay=2, mininterval=1, leave=False):
        num_entries += 1
        answers = distinct(map(without_mark, entry.answers))[: 1 if only_first else None]
        if not answers:
            num_unanswered += 1
            continue
        sample = _sample(task, place, replace(entry, answers=answers), texts, by_passage)
        if entry.passages and not sample.passages:
            num_blank += 1
            continue
        earlier = samples.get(sample.id)
        if earlier is not None and merge and _asked(earlier) == _asked(sample):
            samples[sample.id] = replace(earlier, references=distinct((*earlier.references, *sample.references)))
            continue
        if earlier is not None and entry.id:
            raise DataError(
                f"{place}: the id {entry.id} occurs a second time in the task {task}, after {places[sample.id]}. "
                "Remove one of the two, or all ids: hashes of the questions then stand for them."
            )
        if earlier is not None:
            repeats[sample.id] += 1
            sample = replace(sample, id=f"{sample.id}-{repeats[sample.id]}")
        samples[sample.id], places[sample.id] = sample, place
    if not samples:
        found = f"{num_entries} questions, none with an answer and a text" if num_entries else "no question"
        raise DataError(f"{task}: found {found}{f' ({place})' if place else ''}. {_REMEDY}")
    for number, what in ((num_unanswered, "which have no answer"), (num_blank, "whose passages are empty")):
        if number:
            logger.warning("%s: left out %d of %d questions, %s", task, number, num_entries, what)
    if repeats:
        logger.warning("%s: %d questions repeat earlier ones about the same passage", task, repeats.total())
    return list(samples.values())


def row_entry(fields: Mapping[str, Any], *, question: str | None = None, cluster: str = "") -> Entry:
    """The entry of a row with `question`, `answer` and `passages`, or of one of their other names.

    A text in `passages` is one passage. Titles of passages are left out, as in the reference's data.

    question: the question of rows that have none. The row's own instruction comes before it.
    cluster: name of the field with the cluster, if the row has no field `cluster`.
    """
    given = (fields.get(name) for name in (*QUESTIONS, "instruction"))
    asked = next((value for value in given if value is not None and str(value).strip()), question)
    if not isinstance(asked, str):
        got = "none" if asked is None else type(asked).__name__
        raise DataError(f"expected the question as a text, got {got}")
    instruction = fields.get("instruction")
    return Entry(
        id=own_id(fields),
        question=asked,
        passages=passage_texts(first_of(fields, _PASSAGES)),
        answers=tuple(answer_texts(first_of(fields, _ANSWERS))),
        cluster=first_of(fields, ("cluster", cluster)),
        group=fields.get("group", ""),
        instruction=instruction if isinstance(instruction, str) else "",
    )


def rows_with(*fields: str, question: str | None = None) -> Layout:
    """The layout of rows with these fields (see `Layout`), which `row_entry` reads with this question."""
    return Layout(name="rows", fields=fields, read=lambda row: [row_entry(row, question=question)])


def _kilt(fields: Mapping[str, Any]) -> Iterator[Entry]:
    """A KILT object: answers and provenance in `output`. Passages in the same row (`ctxs`) come first."""
    outputs = rows_of(fields["output"])
    provenance = [item for output in outputs for item in rows_of(output.get("provenance") or []) if item.get("text")]
    yield Entry(
        id=own_id(fields),
        question=fields["input"],
        passages=passage_texts(first_of(fields, _PASSAGES) or provenance),
        answers=tuple(text for output in outputs for text in answer_texts(output.get("answer"))),
    )


ROWS = rows_with("question|query", "answer|answers")
KILT = Layout(name="KILT", fields=("input", "output"), read=_kilt)


def passage_texts(value: Any) -> tuple[str, ...]:
    """The texts of passages, without titles.

    value: a text (one passage), texts, objects with `text`, `sentences` or another usual name, pairs of title and
        sentences (HotpotQA), or an object of lists (the Hub's form of these). Sentences are joined by a space.

    Raises DataError on another form.
    """
    return () if value is None else tuple(titled_passage(item)[1] for item in rows_of(value))


def own_id(fields: Mapping[str, Any]) -> Any:
    """The id of an object; None if it has none."""
    return first_of(fields, _IDS)


def first_of(fields: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The value of the first name that is not null; None if there is none."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def text_id(*texts: str) -> str:
    """A stable id of texts: 16 hexadecimal digits."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the fields of each object of a file, folder or pattern, in the order of names and rows.

    Lines and rows are read in bounded memory. Arrays and objects over several lines are held whole.

    Raises DataError if nothing is there, a file cannot be read, a value is no object, or a folder holds several splits.
    """
    for name in find_files(path):
        file = input_file(name)
        if file is None or file.kind == "text":  # an original file may have any name
            yield from _values(name, read_user_text(name, DataError, remedy=_REMEDY))
        elif file.kind in ("parquet", "arrow"):
            yield from _batches(file, _columns(file))
        elif not _holds_lines(file):
            text = decode_user_text(read_whole(file), str(name), DataError, remedy=_REMEDY, convert=file.convert)
            yield from _values(name, text)
        else:
            yield from _batches(file, ())


def _holds_lines(file: InputFile) -> bool:
    """Whether a file holds one JSON object a line. `.json` files may hold anything, so their first line decides."""
    if ".json" not in file.path.suffixes:
        return why_no_lines(file) is None
    first = next(iter(read_batches(file, columns=(), max_document_bytes=_MAX_FIRST_LINE)), None)
    if first is None or not (lines := [line for line in first.content if isinstance(line, Line)]):
        return False
    try:
        return isinstance(json.loads((lines[0].data or b"").removeprefix(BOM_UTF8)), dict)
    except (ValueError, RecursionError):
        return False


def find_files(path: Path) -> list[Path]:
    """The files of a path, sorted: itself, those in a folder and its subfolders, or those that match a pattern.

    Hidden files, and files of other kinds in a folder, are passed over. Raises DataError if there are none, or if a
    folder holds several splits.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        found = sorted(name for name in path.parent.glob(path.name) if name.is_file())
        if not found:
            raise DataError(f"{path} does not exist. {_REMEDY}")
        return found
    below = sorted(name for name in path.rglob("*") if not any(part[0] == "." for part in name.relative_to(path).parts))
    kinds = [(name, input_file(name)) for name in below if name.name not in _DESCRIPTIONS]
    found = [name for name, file in kinds if file is not None and file.kind != "text"]
    if not found:
        raise DataError(f"{path} holds no file of JSON, JSON lines, Parquet or Arrow. {_REMEDY}")
    splits = {match[1] for name in found for part in name.relative_to(path).parts if (match := _SPLIT.search(part))}
    if len(splits) > 1:
        raise DataError(
            f"{path} holds several splits: {', '.join(sorted(splits))}. Pass one: a file such as {found[0]}, a "
            f"folder that holds it alone, or a pattern such as {found[0].parent / f'*{min(splits)}*'}."
        )
    return found


class _Passage(NamedTuple):
    """A passage without surrounding white space, and its hash."""

    text: str
    digest: str


def _sample(task: str, place: str, entry: Entry, texts: dict[str, _Passage], by_passage: bool) -> EvalSample:
    """The sample of an entry. Raises DataError if a text cannot be encoded."""
    question = None if entry.question is None else without_mark(entry.question).strip()
    new = [text for text in entry.passages if text not in texts]
    for text in (*new, question or "", *entry.answers, entry.id, entry.cluster, entry.group, entry.instruction):
        check_encodable(text, f"{place}: a text")
    texts.update((text, _Passage(text.strip(), text_id(text))) for text in new)
    found = [texts[text] for text in entry.passages if texts[text].text]
    passages = tuple(each.text for each in found)
    sample_id = entry.id or text_id(question or "", *passages[:1], entry.group)
    cluster = found[0].digest if by_passage and found else sample_id
    return EvalSample(
        id=sample_id,
        task=task,
        passages=passages,
        references=entry.answers,
        question=question,
        cluster=entry.cluster or cluster,
        group=entry.group,
        instruction=entry.instruction,
    )


def _asked(sample: EvalSample) -> tuple[str | None, tuple[str, ...]]:
    return sample.question, sample.passages


def _columns(file: InputFile) -> list[str]:
    """The columns of a Parquet or Arrow file."""
    with library_reads("pyarrow", str(file.path), DataError):
        if file.kind == "parquet":
            return import_library(file, "pyarrow.parquet").read_schema(file.path).names
        pyarrow = import_library(file, "pyarrow")
        with pyarrow.memory_map(str(file.path)) as source:
            is_file = source.read(6) == b"ARROW1"  # the file format begins with it, the streaming format does not
            source.seek(0)
            return (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source).schema.names


def _batches(file: InputFile, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of lines or rows, in bounded memory."""
    for batch in read_batches(file, columns=columns, max_document_bytes=_MAX_BYTES):
        for number, parse in read_documents(file, batch, text_field="text", max_bytes=_MAX_BYTES):
            try:
                yield file.where(number), parse()
            except LeftOutError as error:
                raise DataError(f"{file.where(number)}: {error.fault}") from error


def _values(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a text: a JSON array, JSON lines, or one object."""
    number = 0
    for value in parse_user_json_values(text, str(path), DataError, remedy=_REMEDY):
        for content in value if isinstance(value, list) else [value]:
            number += 1
            if not isinstance(content, dict):
                raise DataError(
                    f"{path}, value {number}: expected a JSON object, got {type(content).__name__}. {_REMEDY}"
                )
            yield f"{path}, object {number}", without_mark_in_names(content)


def _found(fields: Mapping[str, Any]) -> str:
    names = sorted(map(str, fields))
    return ", ".join(names[:_MAX_NAMED]) + (", …" if len(names) > _MAX_NAMED else "") or "none"


def _words(fields: Sequence[str]) -> str:
    return ", ".join(field.replace("|", " or ") for field in fields)

"""Reads questions from rows, in the forms in which the Hub and others ship them. Builds and converters use it.

A row holds a question, one or more passages, and its answers:

- `context`: a text (SQuAD), or `title` and `sentences` of several paragraphs (HotpotQA);
- `passages`, `paragraphs`, `ctxs`, …: texts, or objects with `title` and `text` (MS MARCO, MuSiQue, DPR);
- `answers` or `answer`: texts, `{"text": […]}` (SQuAD), `{"spans": […]}` (DROP) or `{"value", "aliases"}` (TriviaQA).

The Hub stores a list of objects as an object of lists. Flattened tables have columns such as `answers.text`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from arc_ds.errors import DataError
from arc_ds.shards.building.question import Question, distinct
from arc_ds.system.user_files import without_mark

_QUESTIONS = ("question", "query")
_PASSAGES = ("context", "contexts", "passages", "passage", "paragraphs", "ctxs", "documents")
_ANSWERS = ("answers", "answer", "answers_spans")
NAMES = ("id", "_id", "query_id", "question_id")
_TEXTS = ("text", "passage_text", "paragraph_text", "sentences", "passage", "contents", "content", "context")
_ANSWER_TEXTS = ("text", "spans", "value", "aliases")
_NO_ANSWER = "No Answer Present."  # MS MARCO
_IS_RELEVANT = ("is_supporting", "is_selected")
TRIVIAQA_DOCUMENTS = {"entity_pages": "wiki_context", "search_results": "search_context"}
ROW_FIELDS = (
    *_QUESTIONS, *_PASSAGES, *_ANSWERS, *TRIVIAQA_DOCUMENTS,
    "instruction", "supporting_facts", "is_impossible", "answerable",
)  # fmt: skip


class RowError(DataError):
    """A row that holds no question in a known form."""


def is_record(fields: dict[str, Any]) -> bool:
    """Whether a row has the form of a fine-tuning record, which a build keeps as it is."""
    return _is_texts(_first(fields, ("passages", "passage"))) and _is_texts(fields.get("answer"))


def is_question_row(fields: dict[str, Any]) -> bool:
    """Whether a row asks a question."""
    return _first(fields, _QUESTIONS) is not None


def read_question(fields: dict[str, Any]) -> Question:
    """Read the question of a row. One without an answer gets the reason `unanswerable`.

    Passages that the row marks as relevant come first. Raises RowError if a field is missing or of an unknown form.
    """
    fields = nested(fields)
    asked = _needed(fields, _QUESTIONS, "question")
    passages = _needed(fields, _PASSAGES, "passages")
    has_null = any(name in fields for name in _ANSWERS) and _first(fields, _ANSWERS) is None
    given = [] if has_null else answer_texts(_needed(fields, _ANSWERS, "answers"))
    answers = distinct(text for text in given if text != _NO_ANSWER)
    if not isinstance(asked, str):
        raise RowError(f"expected the question as a text, got {type(asked).__name__}")
    is_unanswerable = not answers or fields.get("is_impossible") is True or fields.get("answerable") is False
    return Question(
        name=str(_first(fields, NAMES)),
        text=without_mark(asked).strip(),
        passages=_passages(passages, _supporting_titles(fields.get("supporting_facts"))),
        answers=answers,
        reason="unanswerable" if is_unanswerable else None,
    )


def nested(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a row, with those of a flattened one (`answers.text`) put into objects again."""
    result = {name: value for name, value in fields.items() if "." not in name}
    for name, value in fields.items():
        first, dot, rest = name.partition(".")
        inner = result.setdefault(first, {}) if dot else None
        if isinstance(inner, dict):
            inner[rest] = value
    return result


def rows_of(value: Any) -> list[Any]:
    """The items of a list, or of an object of equally long lists (the Hub's form of a list of objects)."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    columns = {name: column for name, column in value.items() if column is not None}
    if not columns or not all(isinstance(column, list) for column in columns.values()):
        return [value]
    if len({len(column) for column in columns.values()}) > 1:
        raise RowError(f"expected lists of one length in the fields {', '.join(columns)}, got several lengths")
    return [dict(zip(columns, items, strict=True)) for items in zip(*columns.values(), strict=True)]


def answer_texts(value: Any) -> list[str]:
    """The texts of an answer, the main one first. Raises RowError if its form is unknown."""
    if value is None:
        return []
    if isinstance(value, str):
        if value.startswith(("{'", '{"')):
            raise RowError(f"expected answers, got an object that was stored as a text: {value[:40]!r}")
        return [without_mark(value)]
    if isinstance(value, list):
        return [text for item in value for text in answer_texts(item)]
    if isinstance(value, dict) and any(name in value for name in _ANSWER_TEXTS):
        return [text for name in _ANSWER_TEXTS for text in answer_texts(value.get(name))]
    got = f"the fields {sorted(value)}" if isinstance(value, dict) else type(value).__name__
    raise RowError(f"expected answers as texts, or an object with {' or '.join(_ANSWER_TEXTS)}, got {got}")


def _passages(value: Any, supporting: frozenset[str]) -> tuple[str, ...]:
    """The passages of a row, the relevant ones first."""
    relevant: dict[bool, list[str]] = {True: [], False: []}
    for item in rows_of(value):
        title, text = titled_passage(item)
        is_relevant = title in supporting or (isinstance(item, dict) and any(item.get(name) for name in _IS_RELEVANT))
        relevant[is_relevant].append(f"{title}\n{text}" if title else text)
    return (*relevant[True], *relevant[False])


def titled_passage(item: Any) -> tuple[str, str]:
    """Title (maybe empty) and text of a passage: a text, an object, or a pair of title and sentences."""
    title, text = "", item
    if isinstance(item, dict):
        title, text = item.get("title") or "", _first(item, _TEXTS)
    elif isinstance(item, list) and len(item) == 2 and isinstance(item[1], list):
        title, text = item
    if _is_texts(text) and isinstance(text, list):
        text = " ".join(sentence.strip() for sentence in text)
    if not isinstance(title, str) or not isinstance(text, str):
        got = f"the fields {sorted(item)}" if isinstance(item, dict) else type(item).__name__
        raise RowError(f"expected passages as texts, or objects with `title` and `text` or `sentences`, got {got}")
    return title, without_mark(text)


def _supporting_titles(facts: Any) -> frozenset[str]:
    """The titles of HotpotQA's supporting facts: objects with `title`, or pairs of title and sentence."""
    rows = rows_of(facts) if facts else []
    titles = (
        row.get("title") if isinstance(row, dict) else row[0] for row in rows if isinstance(row, dict | list) and row
    )
    return frozenset(title for title in titles if isinstance(title, str))


def _needed(fields: dict[str, Any], names: Sequence[str], what: str) -> Any:
    if (value := _first(fields, names)) is None:
        raise RowError(
            f"expected the {what} in one of the fields {', '.join(names)}, got the fields {sorted(fields)[:12]}"
        )
    return value


def _first(fields: dict[str, Any], names: Iterable[str]) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _is_texts(value: Any) -> bool:
    """Whether a value is a text, or a list of at least one text."""
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, str) for item in items)

"""Records: the contents of one member of a shard.

A record is a JSON object of one of two kinds. Pretraining: {"text"}. Fine-tuning: {"passages": [str] or "passage": str,
"question"?: str, "instruction"?: str, "answer": str or [str]}. Other fields are kept and ignored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import Any

from arc_ds.errors import DataError
from arc_ds.system.user_files import ICONV, check_encodable, decode_user_text, without_mark, without_mark_in_names

# A record is one training sequence: 32 chunks of 1024 tokens are 0.2 MB. A larger one is a file without line ends.
MAX_RECORD_BYTES = 16 << 20
_PASSAGES = ("passages", "passage")
_CONVERT = f"tar -xOf TAR MEMBER | {ICONV} > NEW"
_json = json.JSONDecoder()


class RecordError(DataError):
    """A record that cannot be decoded. `arc-ds shards index` counts such records by `reason`."""

    def __init__(self, message: str, reason: str = "bad_record") -> None:
        super().__init__(message)
        self.reason = reason


def encode_record(record: dict[str, Any]) -> bytes:
    """Encode a record as UTF-8 JSON. Equal records give identical bytes."""
    return json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode("utf-8")


def decode_object(payload: bytes) -> dict[str, Any]:
    """Parse a JSON object in UTF-8, with or without a byte order mark; RecordError on anything else.

    More than MAX_RECORD_BYTES are refused before parsing.
    """
    if len(payload) > MAX_RECORD_BYTES:
        raise RecordError(
            f"a record of {len(payload)} bytes; expected at most {MAX_RECORD_BYTES}. Is it a whole file on one line? "
            "Cut it into records.",
            "too_large",
        )
    try:
        record = _json.decode(str(payload, "utf-8"))
    except (ValueError, RecursionError):  # ValueError: not UTF-8, not JSON, a number of thousands of digits
        record = _decode_unusual(payload)
    if not isinstance(record, dict):
        raise RecordError(f"expected a JSON object, got {type(record).__name__}", "not_json")
    return without_mark_in_names(record)


def _decode_unusual(payload: bytes) -> Any:
    """Parse JSON with a byte order mark; RecordError with the reason if the payload is anything else."""
    text = decode_payload(payload)
    try:
        return _json.decode(text)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"expected JSON in UTF-8: {error}", "not_json") from error


def decode_payload(payload: bytes) -> str:
    """Decode the bytes of a tar member; RecordError if they are not UTF-8."""
    not_utf8 = partial(RecordError, reason="not_utf8")
    return decode_user_text(payload, "its text", not_utf8, remedy="Fix or remove it.", convert=_CONVERT)


def pretraining_text(record: dict[str, Any]) -> str:
    """The text of a pretraining record; DataError if it is missing, not a string, or empty."""
    text = text_of(record, "text")
    if not text:
        raise DataError("expected a non-empty string in the field `text`, got an empty one")
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuningRecord:
    """Passages, a question about them, and its answers.

    passages: at least one, the most relevant first.
    question: the question, None if there is none.
    instruction: replaces the question, None if there is none. `{question}` in it is a placeholder for the question.
        "prefix||instruction||suffix" is a whole chat prompt (see `data.tasks.questions`).
    answers: every correct answer.
    """

    passages: tuple[str, ...]
    question: str | None
    instruction: str | None
    answers: tuple[str, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text of the record."""
        asked = (self.instruction, self.question)
        return (*self.passages, *(text for text in asked if text is not None), *self.answers)


def fine_tuning_record(record: dict[str, Any]) -> FineTuningRecord:
    """Parse the fine-tuning record in a JSON object.

    Raises DataError, naming the field, if a field is missing, has the wrong type, is blank although text is required,
    or cannot be encoded as UTF-8, or if an instruction does not have one or three parts.
    """
    instruction = _optional_text(record, "instruction")
    if instruction is not None and (num_parts := len(instruction.split("||"))) not in (1, 3):
        raise DataError(
            f"expected an instruction, or `prefix||instruction||suffix`, in the field 'instruction', got {num_parts} "
            f"parts: {instruction[:60]!r}. Write || twice, or not at all"
        )
    return FineTuningRecord(
        passages=_passages(record),
        question=_optional_text(record, "question"),
        instruction=instruction,
        answers=_texts(record, "answer"),
    )


def text_of(record: dict[str, Any], field: str) -> str:
    """The text of a field, without a byte order mark.

    field: its name, or a path of names such as `document.body`.

    Raises DataError if the text is missing, not a string, or holds lone surrogates (JSON allows \\ud800).
    """
    text = value_of(record, field)
    if not isinstance(text, str):
        raise DataError(f"expected a string in the field {field!r}, got {_got(record, field, text)}")
    text = without_mark(text)
    return text if text.isascii() else check_encodable(text, f"the field {field!r}")


def value_of(record: dict[str, Any], field: str) -> Any:
    """The value of a field, None if it is missing. `a.b` is the field `b` of the object `a`, unless it is a name."""
    if field in record:
        return record[field]
    first, dot, rest = field.partition(".")
    inner = record.get(first)
    return value_of(inner, rest) if dot and isinstance(inner, dict) else None


def _got(record: dict[str, Any], field: str, value: object) -> str:
    """Describe a value that is not text, with the names of the texts inside it."""
    if value is None:
        return "null" if field in record else _fields(record)
    if isinstance(value, dict):
        inner = ", ".join(f"{field}.{name}" for name in sorted(value)[:12])
        return f"an object with the fields {inner}"
    return _kind(value)


def _passages(record: dict[str, Any]) -> tuple[str, ...]:
    given = [field for field in _PASSAGES if record.get(field) is not None]
    if len(given) != 1:
        got = "both" if given else _fields(record)
        raise DataError(f"expected the field `passages` (a list of texts) or `passage` (a text), got {got}")
    return _texts(record, given[0])


def _texts(record: dict[str, Any], field: str) -> tuple[str, ...]:
    """The texts of a field that holds one text or a list of texts, none of them blank."""
    value = record.get(field)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        got = _fields(record) if field not in record else _kind(value)
        raise DataError(f"expected a string or a list of strings in the field {field!r}, got {got}")
    texts = [check_encodable(without_mark(text), f"the field {field!r}") for text in texts]
    if not all(text.strip() for text in texts):
        raise DataError(f"expected text in the field {field!r}, got a blank string")
    return tuple(texts)


def _optional_text(record: dict[str, Any], field: str) -> str | None:
    """The text of a field, None if it is missing, null or blank."""
    if record.get(field) is None:
        return None
    text = text_of(record, field)
    return text if text.strip() else None


def _kind(value: object) -> str:
    """Describe the type of a value that is not a list of strings."""
    if not isinstance(value, list):
        return type(value).__name__
    kinds = sorted({type(item).__name__ for item in value})
    return f"a list of {', '.join(kinds)}" if kinds else "an empty list"


def _fields(record: dict[str, Any]) -> str:
    return f"the fields {sorted(record)[:12]}"

"""Turns the documents of a batch into records. Each worker of a build runs one `RecordMaker`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from arc_ds.errors import DataError
from arc_ds.shards.building.batches import Batch, InputFile
from arc_ds.shards.building.documents import LeftOutError, read_documents, too_large
from arc_ds.shards.building.question_rows import (
    ROW_FIELDS,
    TRIVIAQA_DOCUMENTS,
    is_question_row,
    is_record,
    read_question,
)
from arc_ds.shards.building.text_cutter import TextCutter
from arc_ds.shards.format import RecordKind, SourceInfo
from arc_ds.shards.records import MAX_RECORD_BYTES, encode_record, fine_tuning_record, text_of, value_of
from arc_ds.shards.tar_writer import EncodedRecord
from arc_ds.tokenizers import Tokenizer

OnError = Literal["stop", "skip"]
_FINE_TUNING_FIELDS = ("passages", "passage", "question", "instruction", "answer")
_ROW_COLUMNS = tuple(dict.fromkeys((*_FINE_TUNING_FIELDS, *ROW_FIELDS)))
# Reasons to leave out a document: key in the manifest -> words for the user.
REASONS = {
    "bad_record": "with a field that is missing, of the wrong type or without tokens",
    "cannot_cut": "with a character of more tokens than a record may have",
    "empty": "empty",
    "min_chars": "of too few characters",
    "min_tokens": "of too few tokens",
    "not_json": "that are not JSON objects",
    "not_utf8": "that are not UTF-8",
    "quality": "of too low quality",
    "too_large": "too large",
    "unanswerable": "unanswerable",
}
MAX_NAMED = 20  # faults that are logged in full; further ones are only counted


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordRules:
    """Rules for cutting, filtering and rejecting documents.

    kind: kind of the records.
    text_field: field with the text of a pretraining document.
    max_tokens: maximum length of a pretraining record; longer documents are cut into several.
    min_tokens: minimum length of a pretraining record. Shorter documents are left out; pieces are never shorter.
    min_chars: documents with fewer characters are left out (fine-tuning: characters of the passages).
    quality_field: field with the quality score of a document; None: no quality filter.
    min_quality: documents with a lower score are left out.
    max_document_bytes: a larger document is a fault.
    on_error: a fault stops the build ("stop"), or the document is left out and counted ("skip").
    """

    kind: RecordKind
    text_field: str
    max_tokens: int
    min_tokens: int
    min_chars: int
    quality_field: str | None
    min_quality: float | None
    max_document_bytes: int
    on_error: OnError

    def __post_init__(self) -> None:
        if not 0 < self.min_tokens <= self.max_tokens // 2:
            limit = self.max_tokens // 2
            raise DataError(
                f"min_tokens = {self.min_tokens}: expected 1 to max_tokens / 2 = {limit}. Change either of them."
            )
        if self.max_document_bytes < 1:
            raise DataError(f"max_document_bytes = {self.max_document_bytes}: expected at least 1. Raise it.")
        if (self.quality_field is None) != (self.min_quality is None):
            raise DataError("a quality threshold needs a quality field, and vice versa. Pass both or neither.")

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields of a document that the build reads."""
        fields = (self.text_field,) if self.kind == "pretraining" else _ROW_COLUMNS
        return fields if self.quality_field is None else (*fields, self.quality_field)


@dataclass(slots=True)
class Counts:
    """Counts of documents.

    documents: all documents.
    cut: documents that were cut into several records.
    skipped: documents that were left out, by reason.
    """

    documents: int = 0
    cut: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # not a Counter: `asdict` cannot copy one

    def skip(self, reason: str, num_documents: int = 1) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + num_documents

    def add(self, other: Counts) -> None:
        self.documents += other.documents
        self.cut += other.cut
        for reason, num_documents in other.skipped.items():
            self.skip(reason, num_documents)

    def source_info(self, name: str, num_bytes: int, sha256: str, num_records: int, num_tokens: int) -> SourceInfo:
        """The entry in the manifest of an input with these counts."""
        return SourceInfo(
            name=name,
            bytes=num_bytes,
            sha256=sha256,
            documents=self.documents,
            records=num_records,
            tokens=num_tokens,
            cut=self.cut,
            skipped=dict(sorted(self.skipped.items())),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedBatch:
    """The records of a batch.

    records: the records of its documents.
    counts: the documents of the batch.
    faults: the first `MAX_NAMED` faults, each with file and line or row.
    """

    records: tuple[EncodedRecord, ...]
    counts: Counts
    faults: tuple[str, ...]


class RecordMaker:
    """Makes the records of batches. Equal batches give equal records in every process."""

    def __init__(self, rules: RecordRules, tokenizer: Tokenizer) -> None:
        self.rules = rules
        self.tokenizer = tokenizer
        self._cutter = TextCutter(tokenizer=tokenizer, max_tokens=rules.max_tokens, min_tokens=rules.min_tokens)

    def make(self, file: InputFile, batch: Batch) -> EncodedBatch:
        """Make the records of a batch of documents of a file. Raises DataError for a fault that stops the build."""
        records: list[EncodedRecord] = []
        counts = Counts()
        faults: list[str] = []
        rules = self.rules
        documents = read_documents(file, batch, text_field=rules.text_field, max_bytes=rules.max_document_bytes)
        for number, parse in documents:
            counts.documents += 1
            try:
                fields = parse()
                self._check_quality(fields)
                made = self._fine_tuning(fields) if rules.kind == "fine_tuning" else self._pretraining(fields)
            except LeftOutError as left_out:
                if left_out.fault is not None:
                    fault = f"{file.where(number)}: {left_out.fault}"
                    if rules.on_error == "stop":
                        raise DataError(fault) from left_out
                    faults += [fault] if len(faults) < MAX_NAMED else []
                counts.skip(left_out.reason)
            else:
                counts.cut += len(made) > 1
                records += made
        return EncodedBatch(records=tuple(records), counts=counts, faults=tuple(faults))

    def _check_quality(self, fields: dict[str, Any]) -> None:
        name = self.rules.quality_field
        if name is None:
            return
        quality = value_of(fields, name)
        if isinstance(quality, bool) or not isinstance(quality, int | float):
            got = type(quality).__name__ if quality is not None else f"the fields {sorted(fields)}"
            raise LeftOutError("bad_record", f"expected a number in the field {name!r}, got {got}.")
        if self.rules.min_quality is not None and not quality >= self.rules.min_quality:  # `not >=` also rejects NaN
            raise LeftOutError("quality")

    def _pretraining(self, fields: dict[str, Any]) -> list[EncodedRecord]:
        """Cut the text of a document into records."""
        try:
            text = text_of(fields, self.rules.text_field)
        except DataError as error:
            is_list = isinstance(value_of(fields, self.rules.text_field), list)
            first = "Join its items into one text" if is_list else "Fix it"
            cure = _cure(fields, f"{first}, or choose another field (--text-field) or kind (--kind fine_tuning).")
            raise LeftOutError("bad_record", f"{error}. {cure}") from error
        if not text.strip():
            raise LeftOutError("empty")
        if len(text) < self.rules.min_chars:
            raise LeftOutError("min_chars")
        try:
            pieces = list(self._cutter.cut(text))
        except DataError as error:
            raise LeftOutError("cannot_cut", str(error)) from error
        if len(pieces) == 1 and pieces[0][1] < self.rules.min_tokens:
            raise LeftOutError("min_tokens")
        return [EncodedRecord(encode_record({"text": piece}), num_tokens) for piece, num_tokens in pieces]

    def _fine_tuning(self, fields: dict[str, Any]) -> list[EncodedRecord]:
        """Make one record. Its token count covers all passages, instruction and question, and the longest answer."""
        try:
            if is_question_row(fields) and not is_record(fields):
                fields = _record_of_row(fields)
            record = fine_tuning_record(fields)
        except DataError as error:
            others = "" if is_record(fields) else ", or write its fields as passages, question and answer"
            cure = _cure(fields, f"Fix or remove it{others}.")
            raise LeftOutError("bad_record", f"{error}. {cure}") from error
        if sum(len(passage) for passage in record.passages) < self.rules.min_chars:
            raise LeftOutError("min_chars")
        payload = encode_record({name: fields[name] for name in _FINE_TUNING_FIELDS if fields.get(name) is not None})
        if len(payload) > MAX_RECORD_BYTES:
            raise too_large(len(payload), MAX_RECORD_BYTES)
        asked = [text for text in (record.instruction, record.question) if text is not None]
        in_passages = sum(self._tokens("passages", record.passages))
        num_tokens = in_passages + sum(len(self.tokenizer.encode(text)) for text in asked)
        # Training strips white space around an answer.
        num_tokens += max(self._tokens("answer", [answer.strip() for answer in record.answers]))
        return [EncodedRecord(payload, num_tokens, len(record.passages), in_passages)]

    def _tokens(self, field: str, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text. A text without tokens is a fault: it leaves nothing to read or predict.

        A tokenizer may lack tokens for control characters. A decoder's tokenizer may lack different ones than this
        (encoder's) tokenizer; only training can detect that.
        """
        lengths = [len(self.tokenizer.encode(text)) for text in texts]
        if 0 in lengths:
            text = texts[lengths.index(0)]
            raise LeftOutError(
                "bad_record",
                f"expected text in the field {field!r}, got {text[:40]!r}, which has no token. Fix or remove it.",
            )
        return lengths


def _record_of_row(fields: dict[str, Any]) -> dict[str, Any]:
    """The record of a row that has the form of the Hub. Raises RowError, or LeftOutError if it has no answer."""
    question = read_question(fields)
    if question.reason is not None:
        raise LeftOutError(question.reason)
    instruction = fields.get("instruction")
    return question.to_record() | ({} if instruction is None else {"instruction": instruction})


def _cure(fields: dict[str, Any], usual: str) -> str:
    """The remedy for a document that lacks the fields of a record."""
    if any(name.partition(".")[0] in TRIVIAQA_DOCUMENTS for name in fields):
        return (
            "Rows of TriviaQA hold whole documents; arc-ds shards convert triviaqa FILE --out NEW.jsonl cuts passages."
        )
    if isinstance(fields.get("data", fields.get("Data")), list):
        name = "squad" if "data" in fields else "triviaqa"
        return f"Is it {name}? Then arc-ds shards convert {name} FILE --out NEW.jsonl makes records of it."
    return usual

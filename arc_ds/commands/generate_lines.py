r"""`arc-ds generate --input FILE.jsonl --output FILE.jsonl`: prompts and questions of a file, in batches.

A record is {"id"?, "prompt"} with <context> tags, or {"id"?, "question", "documents", "instruction"?}. A question is
written as in training: `Document: ⟨context⟩\nQuestion: …\nAnswer:`, or in the turns of a chat template. The documents
are one context, one per line. Without an id, a record's line number is its id.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

from arc_ds.batch.segments import Marker, Segment
from arc_ds.commands.model_options import chosen_marker, chosen_template, load_model
from arc_ds.commands.text_inputs import Faults, id_of, parse_line, read_lines, size_of
from arc_ds.data.tasks.chat import Layout, read_layout
from arc_ds.data.tasks.contexts import read_passages
from arc_ds.data.tasks.example import ExampleSpec
from arc_ds.data.tasks.limits import TaskLimits
from arc_ds.data.tasks.questions import QuestionBlock, draw_question, question_example
from arc_ds.errors import ConfigError, DataError, TokenizerError
from arc_ds.inference.arc import ArcModel, Context
from arc_ds.inference.generate import whole_number
from arc_ds.inference.tags import parse_prompt
from arc_ds.shards.records import fine_tuning_record, text_of
from arc_ds.system.files import output
from arc_ds.system.user_files import parse_user_json
from arc_ds.tokenizers import tokenizer_file

logger = logging.getLogger(__name__)

_BLANK_LINE = "\n\n"  # ends an answer in the plain format, as in training
_DOCUMENTS = ("documents", "passages", "passage")
_ANSWER = "a"  # a stand-in: the prompt ends before the answer
_UNLIMITED = sys.maxsize

RecordId = str | int


class Line(NamedTuple):
    """A record that is ready for the decoder. stops: texts that end its continuation, besides those of the options."""

    key: RecordId
    where: str
    prompt: Sequence[str | Context] | Sequence[Segment]
    stops: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Makes prompts of records.

    layout: of questions.
    marker: at the end of contexts.
    """

    model: ArcModel
    decoder: int
    layout: Layout
    marker: Marker | None

    def line(self, record: dict[str, Any], key: RecordId, where: str) -> Line:
        """The prompt of a record. Raises DataError if the record is neither a prompt nor a question."""
        if "prompt" in record:
            return Line(key, where, parse_prompt(text_of(record, "prompt"), self.marker), ())
        return Line(key, where, self._question(record), () if self.layout.is_chat else (_BLANK_LINE,))

    def _question(self, record: dict[str, Any]) -> list[Segment]:
        given = [name for name in _DOCUMENTS if name in record]
        if len(given) != 1 or not ("question" in record or "instruction" in record):
            raise DataError(
                "expected `prompt`, or `question` and `documents` (a list of texts), got the fields "
                f"{sorted(record)[:12]}. Rename its fields."
            )
        asked: dict[str, Any] = {name: record[name] for name in ("question", "instruction") if name in record}
        documents = _texts_of(record, given[0])
        parsed = fine_tuning_record({**asked, "passages": documents, "answer": _ANSWER})
        spec = self._spec(len(parsed.passages))
        question = draw_question(parsed, (len(parsed.passages) - 1, 0), spec)
        encoded = read_passages(question.passages, spec)
        block = QuestionBlock((encoded.document(0, len(encoded)),), question)
        segments = question_example([block], parsed.passages, spec).sample.segments
        return list(takewhile(lambda segment: not segment.in_loss, segments))

    def _spec(self, num_passages: int) -> ExampleSpec:
        encoder, reader = self.model.encoder_tokenizer, self.model.decoder_tokenizers[self.decoder]
        if encoder is None or reader is None:
            raise TokenizerError("questions need the tokenizers of encoder and decoder: add them to their folders")
        limits = TaskLimits(
            max_documents=_UNLIMITED,
            max_passages=num_passages,
            max_question=_UNLIMITED,
            bos=self.model.decoder_bos[self.decoder],
            markers=frozenset(() if self.marker is None else (self.marker,)),
        )
        return ExampleSpec("generate", 0, encoder, reader, limits, self.layout)


def generate_lines(args: argparse.Namespace, options: dict[str, Any]) -> int:
    """Continue the records of `args.input` and append them to `args.output`; return 0 on success.

    options: arguments of `ArcModel.generate`.
    """
    whole_number("--batch-size", args.batch_size, at_least=1, at_most=1 << 20)
    total = size_of([args.input]) if args.input.is_file() else None
    if args.output.exists() and args.output.samefile(args.input):
        raise ConfigError("--output is the input file. Give another file.")
    with output(args.output), _opened(args.output) as out:
        earlier = _earlier_ids(out, args.output)
        model = load_model(args, args.decoder)
        model.generate([], **options)  # mistakes in the options are no faults of a record
        faults = Faults(stops=args.on_error == "stop")
        prompts = Prompts(
            model=model,
            decoder=args.decoder_idx,
            layout=_layout(args, model),
            marker=chosen_marker(args.marker, model),
        )
        num_written = 0
        with tqdm(desc="generate", total=total, unit="B", unit_scale=True, disable=None) as bar:
            for batch in _batches(_new_lines(args.input, prompts, earlier, faults, bar), args.batch_size):
                for line, text in _continue(model, batch, options, faults):
                    out.write(json.dumps({"id": line.key, "text": text}, ensure_ascii=False).encode() + b"\n")
                    num_written += 1
                out.flush()
                os.fsync(out.fileno())
    print(f"{args.output}: {num_written:,} texts; {len(earlier):,} were there already; {faults.count:,} left out")
    faults.report()
    return 0


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file, open for appending, with a lock on it. It is removed if it is empty at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another generation is writing {path}. Wait until it has finished.") from None
        except OSError as failure:
            logger.warning("%s: this file system has no locks (%s); run one generation at a time", path, failure)
        try:
            yield file
        finally:
            if file.seek(0, os.SEEK_END) == 0:
                path.unlink()


def _texts_of(record: dict[str, Any], field: str) -> list[str]:
    """The documents of a record: one text, or a list of texts."""
    given = record[field]
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(f"expected a text or a list of texts in the field {field!r}, got {given!r:.60}.")
    return texts


def _layout(args: argparse.Namespace, model: ArcModel) -> Layout:
    """The layout of questions."""
    tokenizer = model.decoder_tokenizers[args.decoder_idx]
    assert tokenizer is not None, "generate() raises without one"
    name = chosen_template(args, model) or "none"
    return read_layout(name, tokenizer, tokenizer_file(args.decoder[args.decoder_idx]))


def _earlier_ids(file: BinaryIO, path: Path) -> set[RecordId]:
    """Ids of an earlier run's output. The last line is removed if a kill has cut it short."""
    ids: set[RecordId] = set()
    whole = file.seek(0)
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            break
        where, remedy = f"{path}, line {number}", "Give another file as --output."
        record = parse_user_json(line.decode("utf-8", "replace"), where, DataError, remedy=remedy)
        if not isinstance(record, dict) or not {"id", "text"} <= record.keys():
            raise DataError(f"{where} is no output of `arc-ds generate`. {remedy}")
        ids.add(record["id"])
        whole += len(line)
    file.truncate(whole)
    return ids


def _new_lines(path: Path, prompts: Prompts, earlier: set[RecordId], faults: Faults, bar: tqdm) -> Iterator[Line]:
    """The records that the output lacks, in order."""
    seen: set[RecordId] = set()
    for line in read_lines(path):
        bar.update(line.num_bytes)
        try:
            record = parse_line(line)
            given = id_of(record)
            key = line.number if given is None else given
            if key in seen:
                raise DataError(f"an earlier record has the id {key!r} too. Give each record an id of its own.")
            seen.add(key)
            if key not in earlier:
                yield prompts.line(record, key, line.where)
        except DataError as fault:
            faults.add(fault, line.where)


def _batches(lines: Iterator[Line], size: int) -> Iterator[list[Line]]:
    """Adjacent records with the same stops."""
    batch: list[Line] = []
    for line in lines:
        if batch and (len(batch) == size or line.stops != batch[0].stops):
            yield batch
            batch = []
        batch.append(line)
    if batch:
        yield batch


def _continue(model: ArcModel, batch: list[Line], options: dict[str, Any], faults: Faults) -> list[tuple[Line, str]]:
    """The records with their texts. If a batch has a record that cannot be used, each record runs alone."""
    stop = [*options["stop"], *batch[0].stops]
    try:
        texts = model.generate([line.prompt for line in batch], **{**options, "stop": stop})
    except DataError as fault:
        if len(batch) == 1:
            faults.add(fault, batch[0].where)
            return []
        return [found for line in batch for found in _continue(model, [line], options, faults)]
    return list(zip(batch, texts, strict=True))

r"""`arc-ds generate --input FILE.jsonl --output FILE.jsonl`: prompts and questions of a file, in batches.

A record is {"id"?, "prompt"} with <context> tags, or {"id"?, "question", "documents", "instruction"?}. A question is
written as in training: `Document: ⟨context⟩\nQuestion: …\nAnswer:`, or in the turns of a chat template. The documents
are one context, one per line. Without an id, a record's line number is its id.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
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
from arc_ds.tokenizers import tokenizer_file

logger = logging.getLogger(__name__)

_BLANK_LINE = "\n\n"  # ends an answer in the plain format, as in training
_DOCUMENTS = ("documents", "passages", "passage")
_ANSWER = "a"  # a stand-in: the prompt ends before the answer
_UNLIMITED = sys.maxsize
_LINE_START = b'{"id": '  # of the output

RecordId = str | int
Prompt = Sequence[str | Context] | Sequence[Segment]


class Line(NamedTuple):
    """A record that is ready for the decoder.

    key: its id.
    digest: of its line.
    where: file and line number.
    prompt: see `ArcModel.generate`.
    stops: texts that end its continuation, besides those of the options.
    """

    key: RecordId
    digest: str
    where: str
    prompt: Prompt
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

    def of(self, record: dict[str, Any]) -> tuple[Prompt, tuple[str, ...]]:
        """The prompt of a record, and texts that end its continuation besides those of the options.

        Raises DataError if the record is neither a prompt nor a question.
        """
        if "prompt" in record:
            return parse_prompt(text_of(record, "prompt"), self.marker), ()
        return self._question(record), () if self.layout.is_chat else (_BLANK_LINE,)

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
            bos=self.model.readers[self.decoder].bos,
            markers=frozenset(() if self.marker is None else (self.marker,)),
        )
        return ExampleSpec("generate", 0, encoder, reader, limits, self.layout)


def generate_lines(args: argparse.Namespace, options: dict[str, Any]) -> int:
    """Continue the records of `args.input` and append them to `args.output`; return 0 on success.

    options: arguments of `ArcModel.generate`.
    """
    whole_number("--batch-size", args.batch_size, at_least=1, at_most=1 << 20)
    total = size_of([args.input]) if args.input.is_file() else None
    if args.output.exists() and not args.output.is_file():
        raise ConfigError(f"--output is {args.output}, which is not a file that can be continued. Give another path.")
    if args.output.exists() and args.input.exists() and args.output.samefile(args.input):
        raise ConfigError("--output is the input file. Give another file.")
    with output(args.output), _opened(args.output) as out:
        earlier = _earlier_digests(out, args.output)
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
                    written = {"id": line.key, "text": text, "input_digest": line.digest}
                    out.write(json.dumps(written, ensure_ascii=False).encode() + b"\n")
                    num_written += 1
                out.flush()
                os.fsync(out.fileno())
    print(f"{args.output}: {num_written:,} texts; {len(earlier):,} were there already; {faults.count:,} left out")
    faults.report()
    return 0


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file, open for appending, with a lock on it. A new file is removed if it is empty at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
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
            if is_new and file.seek(0, os.SEEK_END) == 0:
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


def _earlier_digests(file: BinaryIO, path: Path) -> dict[RecordId, str]:
    """Ids in the output of earlier runs, with the digests of their records.

    If a kill has cut the last line short, it is removed. Otherwise it gets a line end if it has none.
    """
    digests: dict[RecordId, str] = {}
    line, num_bytes = b"", file.seek(0)
    for number, line in enumerate(file, 1):
        try:
            record = json.loads(line)
            digests[record["id"]] = record["input_digest"]
            is_ours = isinstance(record["text"], str)
        except (ValueError, TypeError, KeyError, RecursionError):  # no JSON, no object of ours, or an id that is a list
            is_ours = False
            if not line.endswith(b"\n") and _LINE_START.startswith(line[: len(_LINE_START)]):
                file.truncate(num_bytes)
                return digests
        if not is_ours:
            raise DataError(f"{path}, line {number} is no output of `arc-ds generate`. Give another file as --output.")
        num_bytes += len(line)
    if line and not line.endswith(b"\n"):
        file.write(b"\n")
    return digests


def _new_lines(
    path: Path, prompts: Prompts, earlier: Mapping[RecordId, str], faults: Faults, bar: tqdm
) -> Iterator[Line]:
    """The records that the output lacks, in order."""
    seen: set[RecordId] = set()
    for line in read_lines(path):
        bar.update(line.num_bytes)
        try:
            record, digest = parse_line(line), hashlib.sha256((line.data or b"").strip()).hexdigest()[:16]
            given = id_of(record)
            key = line.number if given is None else given
            if key in seen:
                raise DataError(f"an earlier record has the id {key!r} too. Give each record an id of its own.")
            seen.add(key)
            if key not in earlier:
                yield Line(key, digest, line.where, *prompts.of(record))
            elif earlier[key] != digest:
                raise DataError(
                    f"the record {key!r} has changed since the output got its text. Give another file as --output."
                )
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

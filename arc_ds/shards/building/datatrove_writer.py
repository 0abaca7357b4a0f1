"""The last step of a datatrove pipeline: its documents become shards.

Each task cuts its documents into records and writes them to a folder of its own, with one file for each file that the
documents came from. The task that finishes last joins the parts of all tasks, in the order of those files. So the
shards do not depend on the number of tasks. They equal those of `arc-ds shards build` for a folder with one JSONL file
of the filtered documents for each of those files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from arc_ds.errors import ArcError, DataError
from arc_ds.shards.building.batches import BATCH_BYTES, Batch, Cursor, InputFile, Line
from arc_ds.shards.building.record_maker import MAX_NAMED, Counts, EncodedBatch, OnError, RecordMaker, RecordRules
from arc_ds.shards.building.state import options_as_json
from arc_ds.shards.building.writer import write_manifest
from arc_ds.shards.format import RecordKind, SourceInfo
from arc_ds.shards.tar_writer import EncodedRecord, ShardWriter
from arc_ds.system.files import whole_folder, write_whole
from arc_ds.system.locks import writing
from arc_ds.tokenizers import load_tokenizer

logger = logging.getLogger(__name__)

_PART, _PLAN = "part.json", "plan.json"


class ShardsStep(PipelineStep):
    """Writes shards of the documents that reach it, and passes them on.

    Executors on several hosts need a file system that all of them share. A task that was killed writes its part again
    when datatrove runs it again. Documents whose metadata have no `file_path` count as one file of their task, so the
    order of the records then depends on the number of tasks.
    """

    name = "ARC-DS shards"
    type = "💽 - WRITER"

    def __init__(
        self,
        out_dir: str | Path,
        tokenizer: str | Path,
        *,
        kind: RecordKind = "pretraining",
        max_tokens: int = 768,
        min_tokens: int = 16,
        shard_bytes: int = 128 << 20,
        text_field: str = "text",
        min_chars: int = 0,
        max_document_bytes: int = 64 << 20,
        on_error: OnError = "stop",
    ) -> None:
        """The options are those of `build_shards`, except for:

        out_dir: folder to create. Until it is complete, the parts are in a hidden folder next to it.
        tokenizer: file or folder of the encoder's tokenizer.
        text_field: field of a record that gets the text of a document. The document's metadata has the other fields
            of fine-tuning records.

        Raises DataError if an option is unusable.
        """
        super().__init__()
        self.out_dir = Path(out_dir).absolute()
        self.work_dir = self.out_dir.with_name(f".{self.out_dir.name}.datatrove")
        self.tokenizer = Path(tokenizer).absolute()
        self.shard_bytes = shard_bytes
        self.rules = RecordRules(
            kind=kind,
            text_field=text_field,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            min_chars=min_chars,
            quality_field=None,
            min_quality=None,
            max_document_bytes=max_document_bytes,
            on_error=on_error,
        )
        if shard_bytes < 1:
            raise DataError(f"shard_bytes = {shard_bytes}: expected at least 1. Change it.")

    def run(
        self, data: Iterator[Document] | None, rank: int = 0, world_size: int = 1
    ) -> Generator[Document, None, None]:
        """Write the part of one task; the last task joins all parts.

        Raises DataError if the shards exist, a document is faulty, or other parts were written with other options, and
        StorageError if the part or the shards cannot be written.
        """
        tokenizer = load_tokenizer(self.tokenizer)
        self._begin(tokenizer.fingerprint, world_size)
        with whole_folder(self._part(rank, world_size), overwrite=True) as folder:
            part = _PartWriter(folder, RecordMaker(self.rules, tokenizer), f"task-{rank:05d}")
            for document in data or ():
                part.add(document)
                yield document
            sources = part.finish()
        self.stat_update("records", value=sum(source.num_records for source in sources))
        self.stat_update("tokens", value=sum(source.num_tokens for source in sources))
        self._join_if_last(tokenizer.fingerprint, world_size)

    def _begin(self, fingerprint: str, world_size: int) -> None:
        """Check that the shards do not exist, and that all parts have the same options."""
        if self.out_dir.exists():
            raise DataError(
                f"{self.out_dir} exists. It is complete if this pipeline wrote it. Otherwise give another folder."
            )
        plan = {"tasks": world_size} | options_as_json(self.rules, self.shard_bytes, fingerprint)
        path = self.work_dir / _PLAN
        self.work_dir.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            write_whole(path, json.dumps(plan))
        if json.loads(path.read_bytes()) != plan:
            raise DataError(
                f"{self.work_dir} has parts of a run with other options, another tokenizer, another number of tasks or "
                "another version of ARC-DS. Delete it and the executor's logging_dir, and run all tasks again."
            )

    def _part(self, rank: int, world_size: int) -> Path:
        return self.work_dir / f"{rank:05d}-of-{world_size:05d}"

    def _join_if_last(self, fingerprint: str, world_size: int) -> None:
        """Join the parts if all are complete. If two tasks finish at the same time, one of them does it."""
        parts = [self._part(rank, world_size) for rank in range(world_size)]
        try:
            with writing(self.work_dir, "join", _OtherTaskJoinsError):
                if not all((part / _PART).is_file() for part in parts):
                    return
                with whole_folder(self.out_dir) as folder:
                    _join(parts, folder, self.rules, self.shard_bytes, fingerprint)
                shutil.rmtree(self.work_dir)
        except _OtherTaskJoinsError:
            logger.info("%s: another task joins the parts", self.out_dir)


class _OtherTaskJoinsError(ArcError):
    """Another task has found all parts complete and joins them."""


@dataclass(slots=True)
class _Source:
    """The documents of one file in the part of a task.

    records: name of the file with their records.
    digest: sha256 of the documents as JSON lines.
    num_bytes: size of these lines.
    """

    records: str
    digest: Any
    counts: Counts
    num_documents: int = 0
    num_bytes: int = 0
    num_records: int = 0
    num_tokens: int = 0


class _PartWriter:
    """Writes the part of one task: the records of each source, and an index of the sources.

    folder: folder for the files.
    maker: makes records of documents.
    default: name of the source of documents that do not name their file.
    """

    def __init__(self, folder: Path, maker: RecordMaker, default: str) -> None:
        self.folder = folder
        self.maker = maker
        self.default = default
        # of the metadata; a pretraining record takes only the document's text
        self._columns = maker.rules.columns if maker.rules.kind == "fine_tuning" else ()
        self._sources: dict[str, _Source] = {}
        self._path = default  # of the current source
        self._lines: list[Line] = []
        self._num_bytes = 0  # of these lines
        self._num_named = 0  # faults logged so far

    def add(self, document: Document) -> None:
        path = str(document.metadata.get("file_path") or self.default)
        if path != self._path or self._num_bytes >= BATCH_BYTES:
            self._flush()
        self._path = path
        source = self._sources.get(path)
        if source is None:
            name = f"{len(self._sources):06d}.records"
            source = self._sources[path] = _Source(name, hashlib.sha256(), Counts())
        line = self._line_of(document)
        source.digest.update(line)
        source.num_bytes += len(line)
        source.num_documents += 1
        is_small = len(line) <= self.maker.rules.max_document_bytes
        self._lines.append(Line(source.num_documents, len(line), line if is_small else None))
        self._num_bytes += len(line)

    def _line_of(self, document: Document) -> bytes:
        fields = {name: value for name, value in document.metadata.items() if name.partition(".")[0] in self._columns}
        fields[self.maker.rules.text_field] = document.text
        return json.dumps(fields, default=str).encode() + b"\n"

    def _flush(self) -> None:
        """Make and write the records of the current lines."""
        if not self._lines:
            return
        source = self._sources[self._path]
        file = InputFile(
            path=Path(f"{self._path} (after the filters)"),
            name=self._path,
            kind="jsonl",
            compression="",
            num_bytes=0,
            mtime_ns=0,
        )
        batch = Batch(cursor=Cursor(), content=tuple(self._lines), position=0)
        encoded = self.maker.make(file, batch)
        for fault in encoded.faults[: MAX_NAMED - self._num_named]:
            logger.warning("left out: %s", fault)
            self._num_named += 1
        with (self.folder / source.records).open("ab") as spool:
            _write_records(spool, encoded)
        source.counts.add(encoded.counts)
        source.num_records += len(encoded.records)
        source.num_tokens += sum(record.num_tokens for record in encoded.records)
        self._lines, self._num_bytes = [], 0

    def finish(self) -> list[_Source]:
        """Write the index of the sources, and return them."""
        self._flush()
        index = []
        for path, source in self._sources.items():
            info = source.counts.source_info(
                path, source.num_bytes, source.digest.hexdigest(), source.num_records, source.num_tokens
            )
            index.append({"records": source.records, "source": asdict(info)})
        write_whole(self.folder / _PART, json.dumps(index))
        return list(self._sources.values())


def _write_records(spool: BinaryIO, encoded: EncodedBatch) -> None:
    """Append records, one on each line: three numbers and the payload, which is JSON and has no line end."""
    for record in encoded.records:
        numbers = (record.num_tokens, record.num_passages, record.passage_tokens)
        spool.write(b"%d %d %d " % numbers + record.payload + b"\n")


def _read_records(path: Path) -> Iterator[EncodedRecord]:
    with path.open("rb") as spool:
        for line in spool:
            *numbers, payload = line[:-1].split(b" ", 3)
            yield EncodedRecord(payload, *map(int, numbers))


def _join(parts: list[Path], folder: Path, rules: RecordRules, shard_bytes: int, fingerprint: str) -> None:
    """Write the shards and the manifest of all parts. Raises DataError if they hold no record."""
    found = [
        (part / entry["records"], SourceInfo(**entry["source"]))
        for part in parts
        for entry in json.loads((part / _PART).read_bytes())
    ]
    found.sort(key=lambda each: each[1].name.split("/"))  # as a build sorts the files of a folder
    folders = [source.name.split("/")[:-1] for _, source in found]
    depth = len(os.path.commonprefix(folders))  # noqa: RUF071 (of lists, so it compares names)
    with ShardWriter(folder, shard_bytes) as writer:
        for path, _ in found:
            for record in _read_records(path):
                writer.write(record)
    if not writer.shards:
        raise DataError(f"the {len(parts)} tasks yield no record. Loosen the filters, or lower the limits.")
    sources = [replace(source, name="/".join(source.name.split("/")[depth:])) for _, source in found]
    write_manifest(writer, rules, fingerprint, sources)

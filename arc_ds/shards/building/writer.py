"""Builds shards: webdataset tars with an index and a manifest. Every build of the same inputs gives identical bytes.

The main process reads the inputs batch by batch, workers cut and serialise the records, and the main process writes
them in order. At the end of each shard the build saves its progress, so that a killed build can resume.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from arc_ds.errors import DataError
from arc_ds.shards.building.batches import Batch, Cursor, InputFile
from arc_ds.shards.building.input_digests import InputDigests
from arc_ds.shards.building.inputs import find_inputs, read_batches
from arc_ds.shards.building.record_maker import MAX_NAMED, Counts, EncodedBatch, OnError, RecordMaker, RecordRules
from arc_ds.shards.building.state import BuildFolder, BuildPlan, Progress
from arc_ds.shards.format import MANIFEST, Manifest, RecordKind, SourceInfo, total_skipped
from arc_ds.shards.parallel import Engine, map_in_order, on_shared_folder
from arc_ds.shards.tar_writer import ShardWriter
from arc_ds.system.files import output, replace_folder, write_whole
from arc_ds.system.locks import writing
from arc_ds.tokenizers import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)


def build_shards(
    inputs: Sequence[str | Path],
    out_dir: str | Path,
    tokenizer: Tokenizer | str | Path,
    *,
    kind: RecordKind = "pretraining",
    max_tokens: int = 768,
    min_tokens: int = 16,
    shard_bytes: int = 128 << 20,
    text_field: str = "text",
    min_chars: int = 0,
    quality_field: str | None = None,
    min_quality: float | None = None,
    max_document_bytes: int = 64 << 20,
    on_error: OnError = "stop",
    workers: int = 1,
    engine: Engine = map_in_order,
    overwrite: bool = False,
    progress: bool = False,
) -> Manifest:
    """Write shards of the inputs' documents to the folder `out_dir` and return its manifest.

    The folder appears atomically. A build that ends early keeps its finished shards in a hidden folder next to
    `out_dir`, and the same call resumes there. The manifest counts all documents that were left out, by reason.

    inputs: text files (one document each), JSONL files (one document a line), Parquet and Arrow files (one document a
        row). Text and JSONL files may be compressed (.gz, .zst). Folders are searched for such files in sorted order;
        their other contents are listed in the log.
    out_dir: folder to create.
    tokenizer: the encoder's tokenizer, or its path.
    kind: kind of the records. Pretraining documents are cut, without losing text, into records. Fine-tuning documents
        have the fields listed in `arc_ds/shards/README.md` and are never cut.
    max_tokens: maximum length of a pretraining record.
    min_tokens: minimum length of a pretraining record. Shorter documents are left out; pieces are never shorter.
    shard_bytes: a shard ends with the member that reaches this size.
    text_field: field with the text of a pretraining document. `a.b` is the field `b` of the object `a`.
    min_chars: documents with fewer characters are left out.
    quality_field: field with the quality score of a document.
    min_quality: documents with a lower score are left out.
    max_document_bytes: a larger document is a fault, as a damaged one is.
    on_error: "stop": a fault stops the build. "skip": faulty documents are left out and counted, and the first ones
        are logged.
    workers: number of processes that cut documents. The result does not depend on it.
    engine: runs these processes, on this host or on many (`arc_ds.shards.ray_engine`).
    overwrite: replace `out_dir` if it exists.
    progress: show a progress bar.

    Raises DataError if an input or option is unusable, or if `out_dir` exists and `overwrite` is false. Raises
    StorageError if the shards cannot be written.
    """
    out_dir = Path(out_dir)
    rules = RecordRules(
        kind=kind,
        text_field=text_field,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        min_chars=min_chars,
        quality_field=quality_field,
        min_quality=min_quality,
        max_document_bytes=max_document_bytes,
        on_error=on_error,
    )
    if shard_bytes < 1 or workers < 1:
        raise DataError(f"shard_bytes = {shard_bytes}, workers = {workers}: expected at least 1. Change them.")
    _check_target(out_dir, overwrite)
    files = _find_files(inputs, rules, out_dir)
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    plan = BuildPlan(files=files, rules=rules, shard_bytes=shard_bytes, tokenizer_fingerprint=tokenizer.fingerprint)
    folder = BuildFolder(out_dir)
    with output(out_dir), writing(folder.path, "build"):
        manifest = _build_in(folder, plan, tokenizer, workers, engine, progress)
        replace_folder(folder.shards, out_dir)
        folder.remove()
    logger.info("%s: %d records in %d shards", out_dir, manifest.samples, len(manifest.shards))
    return manifest


def _check_target(out_dir: Path, overwrite: bool) -> None:
    if out_dir.exists() and not overwrite:
        raise DataError(f"{out_dir} exists. Give another folder, or overwrite=True (--overwrite) to replace it.")
    if overwrite and out_dir.is_dir() and any(out_dir.iterdir()) and not (out_dir / MANIFEST).is_file():
        raise DataError(f"{out_dir} holds files but no {MANIFEST}: not a folder of shards, so it is not replaced.")


def _find_files(inputs: Sequence[str | Path], rules: RecordRules, out_dir: Path) -> tuple[InputFile, ...]:
    """Find the input files. Raises DataError also if the rules need fields that a text file does not have."""
    files = find_inputs(inputs, without=out_dir).files
    texts = [file.path.name for file in files if file.kind == "text"]
    if texts and rules.kind == "fine_tuning":
        raise DataError(
            f"fine-tuning records have several fields; {texts[0]} is plain text. Pass JSONL, Parquet or Arrow."
        )
    if texts and rules.quality_field is not None:
        raise DataError(
            f"{texts[0]} is plain text and has no field {rules.quality_field!r}. Drop the file or the filter."
        )
    return files


def _build_in(
    folder: BuildFolder, plan: BuildPlan, tokenizer: Tokenizer, workers: int, engine: Engine, show_bar: bool
) -> Manifest:
    """Write all shards and the manifest to the build's folder. If the build fails, its finished shards stay there."""
    progress = folder.load(plan) or Progress()
    if progress.shards:
        logger.warning("%s: resuming after %d finished shards", folder.path, len(progress.shards))
    build = _Build(folder, plan, progress)
    try:
        total = sum(file.num_bytes for file in plan.files)
        with tqdm(total=total, unit="B", unit_scale=True, disable=not show_bar) as bar:
            build.run(tokenizer, workers, engine, bar)
    except BaseException:
        if folder.has_progress():
            logger.warning(
                "%d finished shards are kept in %s: the same command resumes the build",
                len(progress.shards),
                folder.path,
            )
        else:
            folder.remove()
        raise
    return write_manifest(build.writer, plan.rules, plan.tokenizer_fingerprint, progress.sources)


def write_manifest(
    writer: ShardWriter, rules: RecordRules, tokenizer_fingerprint: str, sources: Sequence[SourceInfo]
) -> Manifest:
    """Write the manifest of finished shards next to them, and return it."""
    manifest = Manifest(
        samples=writer.num_records,
        tokens=writer.num_tokens,
        max_tokens=rules.max_tokens,
        min_tokens=rules.min_tokens,
        tokenizer_fingerprint=tokenizer_fingerprint,
        shards=tuple(writer.shards),
        sources=tuple(sources),
        kind=rules.kind,
    )
    write_whole(writer.folder / MANIFEST, manifest.to_json())
    return manifest


class _BatchJob(NamedTuple):
    """A batch of the input number `file_idx`."""

    file_idx: int
    file: InputFile
    batch: Batch

    def __str__(self) -> str:
        """The batch in messages: the place of its first document."""
        return f"the documents from {self.file.where(self.batch.cursor.number + 1)} on"


def _encode(rules: RecordRules, tokenizer: Tokenizer | Path, job: _BatchJob) -> EncodedBatch:
    """Make the records of a batch. The workers load the tokenizer from a path."""
    tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, Path) else tokenizer
    return RecordMaker(rules, tokenizer).make(job.file, job.batch)


class _Build:
    """A build in progress."""

    def __init__(self, folder: BuildFolder, plan: BuildPlan, progress: Progress) -> None:
        self.folder = folder
        self.plan = plan
        folder.keep_only(progress.shards)
        self.writer = ShardWriter(folder.shards, plan.shard_bytes, progress.shards)
        self._progress = progress
        self._to_skip = progress.num_records  # records of the first batch that the shards already contain
        self._num_named = 0  # faults logged so far
        self._bytes_done = sum(source.bytes for source in progress.sources)

    def run(self, tokenizer: Tokenizer, workers: int, engine: Engine, bar: tqdm[None]) -> None:
        """Read the inputs from the checkpoint on and write their records.

        Raises DataError on a fault that stops the build, or if the inputs yield no record.
        """
        encode: Callable[[_BatchJob], EncodedBatch]
        if workers == 1 and engine is map_in_order:
            encode = partial(_encode, self.plan.rules, tokenizer)
        else:
            saved = self.folder.path / "tokenizer"
            saved.mkdir(exist_ok=True)
            tokenizer.save(saved)
            encode = on_shared_folder(self.folder.path, partial(_encode, self.plan.rules, saved))
        with InputDigests() as digests:
            jobs = engine(encode, self._jobs(digests), workers)
            with self.writer, closing(jobs):
                for job, encoded in jobs:
                    self._finish_files(job.file_idx, digests)
                    self._write(job, encoded)
                    bar.update(self._bytes_done + job.batch.position - bar.n)
                    bar.set_postfix(records=self.writer.num_records, refresh=False)
                self._finish_files(len(self.plan.files), digests)
        if not self.writer.shards:
            left_out = ", ".join(f"{count} {reason}" for reason, count in total_skipped(self._progress.sources).items())
            raise DataError(
                f"the inputs ({', '.join(file.path.name for file in self.plan.files[:5])}) yield no record: "
                f"{left_out or 'no document'} left out. Give other inputs, or lower the limits."
            )

    def _jobs(self, digests: InputDigests) -> Iterator[_BatchJob]:
        """Yield the batches from the current one on."""
        rules, first, cursor = self.plan.rules, self._progress.file_idx, self._progress.cursor
        for idx, file in enumerate(self.plan.files[first:], start=first):
            digests.begin(file.path)
            batches = read_batches(
                file, columns=rules.columns, max_document_bytes=rules.max_document_bytes, start=cursor
            )
            yield from (_BatchJob(idx, file, batch) for batch in batches)
            cursor = Cursor()

    def _write(self, job: _BatchJob, encoded: EncodedBatch) -> None:
        """Append the records of one batch, and save the progress whenever a shard is finished."""
        named = encoded.faults[: MAX_NAMED - self._num_named]
        for fault in named:
            logger.warning("left out: %s", fault)
        self._num_named += len(named)
        if named and self._num_named == MAX_NAMED:
            logger.warning("further faults are counted, but not logged")
        for number, record in enumerate(encoded.records[self._to_skip :], start=self._to_skip + 1):
            is_finished = self.writer.write(record)
            self._progress.file_records += 1
            self._progress.file_tokens += record.num_tokens
            if is_finished:
                self._save(job, number)
        self._to_skip = 0
        self._progress.counts.add(encoded.counts)

    def _save(self, job: _BatchJob, num_records: int) -> None:
        progress = self._progress
        progress.shards = self.writer.shards
        progress.file_idx, progress.cursor, progress.num_records = job.file_idx, job.batch.cursor, num_records
        self.folder.save(self.plan, progress)

    def _finish_files(self, end: int, digests: InputDigests) -> None:
        """Record the results of the inputs before index `end`. Raises DataError if one changed while it was read."""
        progress = self._progress
        for file in self.plan.files[len(progress.sources) : end]:
            digest = digests.take(file.path)
            if file.has_changed():
                raise DataError(f"{file.path} changed while it was read. Build again when it is complete.")
            info = progress.counts.source_info(
                file.name, file.num_bytes, digest, progress.file_records, progress.file_tokens
            )
            progress.sources.append(info)
            self._bytes_done += file.num_bytes
            progress.counts, progress.file_records, progress.file_tokens = Counts(), 0, 0

"""Building shards: text and JSONL become webdataset tars with an index and a manifest, the same bytes each time."""

from __future__ import annotations

import gzip
import hashlib
import logging
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash
from tqdm import tqdm

from arc_ds.data.records import decode_object, encode_record, text_of
from arc_ds.data.shards import INDEX_DTYPE, MANIFEST, Manifest, ShardInfo, SourceInfo, sha256_of_file
from arc_ds.data.text_cutter import TextCutter
from arc_ds.data.tokenizers import Tokenizer, load_tokenizer
from arc_ds.errors import DataError

logger = logging.getLogger(__name__)

_BLOCK = tarfile.BLOCKSIZE
_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".txt.gz")


def build_shards(
    inputs: Sequence[str | Path],
    out_dir: str | Path,
    tokenizer: Tokenizer | str | Path,
    *,
    max_tokens: int = 768,
    min_tokens: int = 16,
    shard_bytes: int = 128 << 20,
    text_field: str = "text",
    overwrite: bool = False,
    progress: bool = False,
) -> Manifest:
    """Write shards of the inputs' texts to the folder `out_dir` and return its manifest.

    inputs: text files (one document each), JSONL files (one document a line, in `text_field`), either also as .gz, or
        folders, which are searched for both in sorted order.
    tokenizer: the encoder's, or its path. Documents of more than `max_tokens` tokens are cut, losing nothing.
    min_tokens: documents of fewer tokens are left out and counted; no piece of a longer one is shorter.
    shard_bytes: a shard ends with the member that reaches this size.
    The folder appears whole or not at all. DataError on an unusable input, or where `out_dir` exists and `overwrite`
    is not given.
    """
    out_dir = Path(out_dir)
    if not 0 < min_tokens <= max_tokens // 2:
        raise DataError(f"min_tokens = {min_tokens}: expected 1 to max_tokens / 2 = {max_tokens // 2}. Change either.")
    if out_dir.exists() and not overwrite:
        raise DataError(f"{out_dir} exists. Give another folder, or overwrite=True (--overwrite) to replace it.")
    if overwrite and out_dir.is_dir() and any(out_dir.iterdir()) and not (out_dir / MANIFEST).is_file():
        raise DataError(f"{out_dir} holds files but no {MANIFEST}: not a folder of shards, so it is not replaced.")
    files = find_inputs(inputs)
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    cutter = TextCutter(tokenizer=tokenizer, max_tokens=max_tokens, min_tokens=min_tokens)
    partial = out_dir.with_name(f".{out_dir.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        manifest = _build_in(partial, files, cutter, shard_bytes, text_field, progress)
        _publish(partial, out_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    logger.info("%s: %d records in %d shards", out_dir, manifest.samples, len(manifest.shards))
    return manifest


def _build_in(
    folder: Path, files: list[Path], cutter: TextCutter, shard_bytes: int, text_field: str, progress: bool
) -> Manifest:
    """Write all shards and the manifest to an empty folder."""
    sources = []
    with ShardWriter(folder, shard_bytes) as writer, tqdm(total=len(files), unit="file", disable=not progress) as bar:
        for path in files:
            sources.append(_write_source(writer, path, cutter, text_field))
            bar.update()
            bar.set_postfix(records=writer.num_records, refresh=False)
    if not writer.shards:
        raise DataError(
            f"the inputs ({', '.join(path.name for path in files[:5])}) give no record: every document is empty or "
            f"shorter than min_tokens = {cutter.min_tokens}. Give other inputs or a smaller min_tokens."
        )
    manifest = Manifest(
        samples=sum(shard.samples for shard in writer.shards),
        tokens=sum(shard.tokens for shard in writer.shards),
        max_tokens=cutter.max_tokens,
        min_tokens=cutter.min_tokens,
        tokenizer_fingerprint=cutter.tokenizer.fingerprint,
        shards=tuple(writer.shards),
        sources=tuple(sources),
    )
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(manifest.to_json())
        _sync(file.fileno())
    if manifest.skipped:
        logger.warning("documents left out: %s", manifest.skipped)
    return manifest


def _write_source(writer: ShardWriter, path: Path, cutter: TextCutter, text_field: str) -> SourceInfo:
    """Append the records of one input file."""
    documents = cut = 0
    skipped: Counter[str] = Counter()
    first_record, first_token = writer.num_records, writer.num_tokens
    for where, text in read_documents(path, text_field):
        documents += 1
        if not text.strip():
            skipped["empty"] += 1
            continue
        try:
            pieces = list(cutter.cut(text))
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        if len(pieces) == 1 and pieces[0][1] < cutter.min_tokens:
            skipped["short"] += 1
            continue
        cut += len(pieces) > 1
        for piece, num_tokens in pieces:
            writer.write(encode_record({"text": piece}), num_tokens)
    return SourceInfo(
        name=path.name,
        bytes=path.stat().st_size,
        sha256=sha256_of_file(path),
        documents=documents,
        records=writer.num_records - first_record,
        tokens=writer.num_tokens - first_token,
        cut=cut,
        skipped=dict(sorted(skipped.items())),
    )


def _publish(partial: Path, out_dir: Path) -> None:
    """Rename the finished folder into place; an old one is moved aside first and removed last."""
    old = None
    if out_dir.exists():
        old = out_dir.with_name(f".{out_dir.name}.old-{os.getpid()}")
        out_dir.rename(old)
    partial.rename(out_dir)
    descriptor = os.open(out_dir.parent, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)
    if old is not None:
        shutil.rmtree(old)


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)


def find_inputs(inputs: Sequence[str | Path]) -> list[Path]:
    """The input files, folders replaced by what they hold in sorted order; DataError on a missing or unknown one."""
    files: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(f for f in path.rglob("*") if f.is_file() and f.name.endswith(_SUFFIXES))
            if not found:
                raise DataError(f"{path}: expected files ending in {', '.join(_SUFFIXES)}, found none. Check the path.")
            files += found
        elif path.is_file() and path.name.endswith(_SUFFIXES):
            files.append(path)
        else:
            state = "of another kind" if path.exists() else "missing"
            raise DataError(f"input {path} is {state}; expected a folder or a file ending in {', '.join(_SUFFIXES)}.")
    if not files:
        raise DataError("no inputs were given. Name text or JSONL files, or folders of them.")
    return files


def read_documents(path: Path, text_field: str) -> Iterator[tuple[str, str]]:
    """Yields (where, text) of each document of a file; DataError with file and line on what cannot be read."""
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            if ".jsonl" not in path.suffixes:
                yield str(path), file.read().decode("utf-8")
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield where, _text_of_line(line, where, text_field)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}). Mend or leave out the file.") from error


def _text_of_line(line: bytes, where: str, text_field: str) -> str:
    try:
        return text_of(decode_object(line), text_field)
    except DataError as error:
        raise DataError(f"{where}: {error}. Mend or remove the line, or name the field with --text-field.") from error


@dataclass(frozen=True, slots=True)
class _Row:
    offset: int
    length: int
    xxh64: int
    tokens: int


class ShardWriter:
    """Writes members to tars of about `shard_bytes` in a folder, with an index beside each; a context manager.

    The bytes follow from the members alone: no times, owners or random names are written.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.shards: list[ShardInfo] = []
        self.num_records = self.num_tokens = 0
        self._tar: BinaryIO | None = None
        self._stack = ExitStack()
        self._digest = hashlib.sha256()
        self._rows: list[_Row] = []
        self._offset = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._tar is not None:
            self._finish()
        self._stack.close()

    def write(self, payload: bytes, num_tokens: int) -> None:
        """Append one record as the member `KEY.json`, KEY being its number among all records."""
        if self._tar is None:
            self._begin()
        header = tarfile.TarInfo(f"{self.num_records:09d}.json")
        header.size, header.mode = len(payload), 0o644
        self._append(header.tobuf(tarfile.USTAR_FORMAT))
        self._rows.append(_Row(self._offset, len(payload), xxhash.xxh64_intdigest(payload), num_tokens))
        self._append(payload + b"\0" * (-len(payload) % _BLOCK))
        self.num_records += 1
        self.num_tokens += num_tokens
        if self._offset >= self.shard_bytes:
            self._finish()

    def _begin(self) -> None:
        path = self.folder / f"shard-{len(self.shards):06d}.tar"
        self._tar = self._stack.enter_context(path.open("wb"))
        self._digest, self._rows, self._offset = hashlib.sha256(), [], 0

    def _append(self, data: bytes) -> None:
        assert self._tar is not None, "a shard is open while members are appended"
        self._tar.write(data)
        self._digest.update(data)
        self._offset += len(data)

    def _finish(self) -> None:
        """End the tar, write its index, and note both for the manifest."""
        end = 2 * _BLOCK
        self._append(b"\0" * (end + -(self._offset + end) % tarfile.RECORDSIZE))
        assert self._tar is not None, "a shard is open when it is finished"
        self._tar.flush()
        _sync(self._tar.fileno())
        name = Path(self._tar.name).name
        self._stack.close()
        self._tar = None
        index = np.array([(r.offset, r.length, r.xxh64, r.tokens) for r in self._rows], dtype=INDEX_DTYPE)
        index_path = self.folder / (Path(name).stem + ".idx")
        with index_path.open("wb") as file:
            np.save(file, index, allow_pickle=False)
            file.flush()
            _sync(file.fileno())
        self.shards.append(
            ShardInfo(
                name=name,
                samples=len(index),
                tokens=int(index["tokens"].sum()),
                bytes=self._offset,
                sha256=self._digest.hexdigest(),
                index_sha256=sha256_of_file(index_path),
            )
        )

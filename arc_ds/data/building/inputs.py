"""The inputs of a build: which files, and their documents in batches that are the same however they are worked on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from arc_ds.errors import DataError

if TYPE_CHECKING:
    import pyarrow

InputKind = Literal["text", "jsonl", "parquet"]
Compression = Literal["", "gz", "zst"]

# What a file's name ends in: its kind and compression.
_ENDINGS: dict[str, tuple[InputKind, Compression]] = {
    ".txt": ("text", ""),
    ".txt.gz": ("text", "gz"),
    ".txt.zst": ("text", "zst"),
    ".jsonl": ("jsonl", ""),
    ".jsonl.gz": ("jsonl", "gz"),
    ".jsonl.zst": ("jsonl", "zst"),
    ".parquet": ("parquet", ""),
}
BATCH_BYTES = 1 << 20  # about what a worker gets at once: large against the cost of handing it over


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """One file of documents.

    name: what the manifest calls it, the path inside the folder that was given. num_bytes, mtime_ns: its size on disk
    and time of change when it was found, which must stay so while it is worked on.
    """

    path: Path
    name: str
    kind: InputKind
    compression: Compression
    num_bytes: int
    mtime_ns: int

    def where(self, number: int) -> str:
        """How a message names a document of this file; `number` counts lines or rows from 1."""
        if self.kind == "text":
            return str(self.path)
        return f"{self.path}, {'line' if self.kind == 'jsonl' else 'row'} {number}"

    def has_changed(self) -> bool:
        """Whether it is another one now than when it was found, or gone."""
        try:
            status = self.path.stat()
        except OSError:
            return True
        return (status.st_size, status.st_mtime_ns) != (self.num_bytes, self.mtime_ns)


class Cursor(NamedTuple):
    """Where a batch begins.

    place: for lines their offset in the decompressed bytes, for Parquet the row group.
    number: lines of the file, or rows of the row group, in front of the batch.
    """

    place: int = 0
    number: int = 0


class Line(NamedTuple):
    """A line of a JSONL file, or a whole text file, of `size` bytes. data: None where that is more than allowed."""

    number: int
    size: int
    data: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Documents that one worker handles together, about `BATCH_BYTES` or a single larger one.

    content: lines, or Parquet rows of which the first has the number `first_row` in its file, from 1.
    position: bytes of the file on disk that were read up to its end.
    """

    cursor: Cursor
    content: tuple[Line, ...] | pyarrow.RecordBatch
    position: int
    first_row: int = 1


def find_inputs(inputs: Sequence[str | Path]) -> list[InputFile]:
    """The input files, folders replaced by what they hold in sorted order.

    DataError on a missing or unknown one, on a file named twice, and on a folder without any.
    """
    files: list[InputFile] = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if _ending(file) and file.is_file())
            if not found:
                raise DataError(f"{path}: expected files ending in {', '.join(_ENDINGS)}, found none. Check the path.")
            files += [_input_file(file, str(file.relative_to(path))) for file in found]
        elif path.is_file() and _ending(path):
            files.append(_input_file(path, path.name))
        else:
            state = "of another kind" if path.exists() else "missing"
            raise DataError(f"input {path} is {state}; expected a folder or a file ending in {', '.join(_ENDINGS)}.")
    if not files:
        raise DataError("no inputs were given. Name text, JSONL or Parquet files, or folders of them.")
    seen: set[Path] = set()
    for file in files:
        if file.path.absolute() in seen:
            raise DataError(f"input {file.path} is named twice, so its documents would be. Name it once.")
        seen.add(file.path.absolute())
    return files


def _ending(path: Path) -> str | None:
    return next((ending for ending in _ENDINGS if path.name.endswith(ending)), None)


def _input_file(path: Path, name: str) -> InputFile:
    kind, compression = _ENDINGS[_ending(path) or ""]
    status = path.stat()
    return InputFile(
        path=path,
        name=name,
        kind=kind,
        compression=compression,
        num_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
    )


def read_batches(
    file: InputFile, *, columns: Sequence[str], max_document_bytes: int, start: Cursor | None = None
) -> Iterator[Batch]:
    """The documents of a file from the batch that begins at `start`; memory does not grow with the file.

    columns: those of a Parquet file that are read, where it has them.
    DataError where the file cannot be read: missing, cut short, damaged, or the library that reads it is not there.
    """
    start = start or Cursor()
    if file.kind == "parquet":
        from arc_ds.data.building.inputs_parquet import read_row_batches

        return read_row_batches(file, columns, start)
    from arc_ds.data.building.inputs_lines import read_line_batches, read_text_batch

    if file.kind == "text":
        return read_text_batch(file, max_document_bytes)
    return read_line_batches(file, max_document_bytes, start)

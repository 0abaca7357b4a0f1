"""Input files, and batches of their documents. Batches do not depend on the number of workers."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from arc_ds.errors import DataError
from arc_ds.system.user_files import ICONV

if TYPE_CHECKING:
    import pyarrow

InputKind = Literal["text", "jsonl", "parquet", "arrow"]
Compression = Literal["", "gz", "zst"]
_CONVERT: dict[Compression, str] = {
    "": f"{ICONV} FILE > NEW",
    "gz": f"gzip -dc FILE | {ICONV} > NEW",
    "zst": f"zstd -dc FILE | {ICONV} > NEW",
}
BATCH_BYTES = 1 << 20  # approximate size of one worker task; large compared with the cost of sending it


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """One file of documents.

    name: its name in the manifest: the path relative to the input folder, or the file name of an input file.
    num_bytes: size on disk when the file was found. It must not change during the build.
    mtime_ns: modification time when the file was found. It must not change during the build.
    """

    path: Path
    name: str
    kind: InputKind
    compression: Compression
    num_bytes: int
    mtime_ns: int

    def where(self, number: int) -> str:
        """The location of a document for messages; `number` counts lines or rows from 1."""
        if self.kind == "text":
            return str(self.path)
        return f"{self.path}, {'line' if self.kind == 'jsonl' else 'row'} {number}"

    @property
    def convert(self) -> str:
        """The command that converts its text to UTF-8 (see `check_is_utf8`)."""
        return _CONVERT[self.compression]

    def has_changed(self) -> bool:
        """Whether the file was deleted, or its size or modification time changed, since it was found."""
        try:
            status = self.path.stat()
        except OSError:
            return True
        return (status.st_size, status.st_mtime_ns) != (self.num_bytes, self.mtime_ns)


class Cursor(NamedTuple):
    """The start of a batch.

    place: for lines, the offset in the decompressed bytes; for rows, the index of the group (a row group of Parquet, a
        record batch of Arrow).
    number: how many lines of the file, or rows of the group, come before the batch.
    """

    place: int = 0
    number: int = 0


class Line(NamedTuple):
    """A line of a JSONL file, or a whole text file.

    number: line number, from 1.
    size: size in bytes.
    data: the bytes; None if the size exceeds the limit.
    """

    number: int
    size: int
    data: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Documents that one worker handles together: about `BATCH_BYTES`, or a single larger document.

    cursor: the start of the batch.
    content: lines, or rows of a Parquet or Arrow file.
    position: how many bytes of the file on disk have been read at the end of the batch.
    first_row: number of the first row in its file, from 1.
    """

    cursor: Cursor
    content: tuple[Line, ...] | pyarrow.RecordBatch
    position: int
    first_row: int = 1


def import_library(file: InputFile, name: str) -> Any:
    """Import an optional package that reads a file. Raises DataError, with the remedy, if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise DataError(f"{file.path}: needs the package {package}. Run: pip install {package}") from error

"""Files of documents, and batches of their documents that are the same however they are worked on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import pyarrow

InputKind = Literal["text", "jsonl", "parquet"]
Compression = Literal["", "gz", "zst"]
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

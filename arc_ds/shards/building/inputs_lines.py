"""Reads text and JSONL files, plain or compressed, in bounded memory."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import IO, TYPE_CHECKING, Any, BinaryIO, cast

from arc_ds.errors import DataError
from arc_ds.shards.building.batches import BATCH_BYTES, Batch, Cursor, InputFile, Line, import_library
from arc_ds.system.user_files import HEAD, check_is_utf8

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_CHUNK = 1 << 20
_HEAD = 1 << 16
_BLANK = (b"", codecs.BOM_UTF8)  # an empty file may have a byte order mark, also after files are joined
_ZSTD_CHUNK = 1 << 14  # compressed bytes per step; their entire output is held in memory
_ZSTD_MAX_WINDOW = 1 << 31  # files written with `zstd --long=31`


def why_no_lines(file: InputFile) -> str | None:
    """The fault and remedy of a .json file that begins like an array or a multi-line object; None if it is JSONL.

    Raises DataError if the file cannot be read.
    """
    with _opened(file) as (_, stream):
        heads = (head.strip() for head in iter(lambda: stream.readline(_HEAD), b""))
        first, second = [*islice(filter(None, heads), 2), b"", b""][:2]
    first = first.removeprefix(codecs.BOM_UTF8).lstrip()
    if first.startswith(b"["):
        what, how = "an array", "'.[]'"
    elif first == b"{" and second.startswith((b'"', b"}")):
        what, how = "an object over several lines", "."
    else:
        return None
    return (
        f"{file.path}: expected one JSON object a line, found {what}. Convert it (jq -c {how} A.json > A.jsonl; "
        "for questions: arc-ds shards convert), or leave out the file."
    )


def read_text_batch(file: InputFile, max_document_bytes: int) -> Iterator[Batch]:
    """Read the whole file as one document."""
    with _opened(file) as (_, stream):
        data = stream.read(max_document_bytes + 1)
        size = len(data) + _discard(stream)
    line = Line(number=1, size=size, data=data if size <= max_document_bytes else None)
    yield Batch(cursor=Cursor(), content=(line,), position=file.num_bytes)


def read_whole(file: InputFile) -> bytes:
    """The decompressed bytes of a file. Raises DataError if it cannot be read."""
    with _opened(file) as (_, stream):
        return stream.read()


def read_line_batches(file: InputFile, max_document_bytes: int, start: Cursor) -> Iterator[Batch]:
    """Read the non-blank lines. The bytes of a line longer than `max_document_bytes` are discarded.

    Raises DataError if the file is UTF-16, which has other line ends, or cannot be read.
    """
    with _opened(file) as (raw, stream):
        check_is_utf8(
            cast(io.BufferedReader, stream).peek(HEAD)[:HEAD], str(file.path), DataError, convert=file.convert
        )
        if file.compression:
            _discard(stream, start.place)
        else:
            stream.seek(start.place)
        offset, number = start
        while lines := _next_lines(stream, number, max_document_bytes):
            content = tuple(line for line in lines if line.data is None or line.data.strip() not in _BLANK)
            yield Batch(cursor=Cursor(offset, number), content=content, position=raw.tell())
            offset += sum(line.size for line in lines)
            number = lines[-1].number


def _next_lines(stream: IO[bytes], number: int, max_document_bytes: int) -> list[Line]:
    """Read lines of about `BATCH_BYTES` in total; an empty list at the end of the file.

    number: the number of the line before the first one.
    """
    lines: list[Line] = []
    total = 0
    while total < BATCH_BYTES:
        data = stream.readline(max_document_bytes + 2)  # one for the newline, one to detect a longer line
        if not data:
            break
        number += 1
        if len(data.rstrip(b"\r\n")) <= max_document_bytes:
            lines.append(Line(number, len(data), data))
        else:
            lines.append(Line(number, len(data) + _discard_line(stream, data), None))
        total += len(data)
    return lines


def _discard_line(stream: IO[bytes], begun: bytes) -> int:
    """Skip the rest of a line that begins with `begun`; return the number of bytes skipped."""
    size = 0
    while not begun.endswith(b"\n") and (begun := stream.readline(_CHUNK)):
        size += len(begun)
    return size


def _discard(stream: IO[bytes], num_bytes: int | None = None) -> int:
    """Skip `num_bytes` bytes (None: all remaining ones); return the number of bytes skipped."""
    passed = 0
    while num_bytes is None or passed < num_bytes:
        wanted = _CHUNK if num_bytes is None else min(_CHUNK, num_bytes - passed)
        chunk = stream.read(wanted)
        if not chunk:
            break
        passed += len(chunk)
    return passed


@contextmanager
def _opened(file: InputFile) -> Iterator[tuple[BinaryIO, IO[bytes]]]:
    """Open a file; yield it and the stream of its decompressed bytes. Every read error becomes a DataError."""
    broken: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    if file.compression == "zst":
        zstandard = import_library(file, "zstandard")
        broken = (*broken, zstandard.ZstdError)
    try:
        with file.path.open("rb") as raw:
            if file.compression == "gz":
                yield raw, io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=raw)), _CHUNK)
            elif file.compression == "zst":
                yield raw, io.BufferedReader(_ChunkStream(_zstd_chunks(raw, zstandard)), _CHUNK)
            else:
                yield raw, raw
    except broken as error:
        raise DataError(f"{file.path}: cannot be read ({error}). Repair, replace or leave out the file.") from error


def _zstd_chunks(raw: BinaryIO, zstandard: Any) -> Iterator[bytes]:
    """Yield the decompressed bytes of all zstd frames of a file. Raises EOFError if the last frame is truncated.

    zstandard's own stream reader does not report a truncated file; it returns fewer bytes.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW)
    frame, data = None, b""
    while data := data or raw.read(_ZSTD_CHUNK):
        frame = decompressor.decompressobj() if frame is None or frame.eof else frame
        yield frame.decompress(data)
        data = frame.unused_data if frame.eof else b""
    if frame is not None and not frame.eof:
        raise EOFError("the last zstd frame is truncated")


class _ChunkStream(io.RawIOBase):
    """A stream of chunks of bytes."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        while not self._ready:
            if (chunk := next(self._chunks, None)) is None:
                return 0
            self._ready = memoryview(chunk)
        target = memoryview(buffer).cast("B")
        size = min(len(target), len(self._ready))
        target[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

"""Texts and lines of JSONL files that commands read, and those lines that cannot be used."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from arc_ds.errors import DataError
from arc_ds.shards.building.inputs import input_file, read_batches
from arc_ds.shards.records import MAX_RECORD_BYTES, decode_object
from arc_ds.system.user_files import read_user_stdin, read_user_text

logger = logging.getLogger(__name__)

STDIN = Path("-")
_MAX_NAMED = 10


class RecordLine(NamedTuple):
    """A line of a JSONL file.

    where: file and line number.
    number: line number, from 1.
    data: the bytes; None if there are more than `MAX_RECORD_BYTES`.
    num_bytes: size on disk; 0 in compressed files.
    """

    where: str
    number: int
    data: bytes | None
    num_bytes: int


@dataclass
class Faults:
    """Inputs that cannot be used: the first one is an error, or all are counted and the first ones are logged."""

    stops: bool
    count: int = 0

    def add(self, fault: DataError, where: str | None = None) -> None:
        """Note a fault. Raises DataError if it stops the command.

        where: file and line; None if the fault names the file.
        """
        message = str(fault) if where is None else f"{where}: {fault}"
        if self.stops:
            raise DataError(f"{message} To leave out such inputs, add --on-error skip.") from fault
        self.count += 1
        if self.count <= _MAX_NAMED:
            logger.warning("left out: %s", message)

    def report(self) -> None:
        """Log the number of faults if there are more than were logged."""
        if self.count > _MAX_NAMED:
            logger.warning("%d inputs were left out in all; correct them and run the same command again", self.count)


def add_on_error(parser: argparse.ArgumentParser) -> None:
    """Add the option `--on-error`."""
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="what to do with a text or a line of a JSONL file that cannot be used (default: stop)",
    )


def read_text(path: Path) -> str:
    """The text of a file, or of standard input for "-", with line feeds as its only line ends."""
    if path == STDIN:
        text = read_user_stdin(DataError)
    else:
        text = read_user_text(path, DataError, remedy="Give the path of a text file in UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def is_lines(path: Path) -> bool:
    """Whether a path is a JSONL file, by its name."""
    return path.suffix in (".jsonl", ".ndjson") or path.name.endswith((".jsonl.gz", ".jsonl.zst"))


def read_lines(path: Path) -> Iterator[RecordLine]:
    """The lines of a JSONL file that are not blank, in bounded memory. Raises DataError if it cannot be read."""
    file = input_file(path)
    if file is None:
        state = "has another name" if path.exists() else "does not exist"
        raise DataError(f"{path} {state}; expected a file of JSON lines that ends in .jsonl. Check the path.")
    for batch in read_batches(file, columns=(), max_document_bytes=MAX_RECORD_BYTES):
        for line in batch.content:
            yield RecordLine(file.where(line.number), line.number, line.data, 0 if file.compression else line.size)


def parse_line(line: RecordLine) -> dict[str, Any]:
    """The JSON object of a line. Raises DataError on anything else."""
    if line.data is None:
        raise DataError(f"the line has more than {MAX_RECORD_BYTES} bytes. Cut it into records.")
    return decode_object(line.data)


def id_of(record: dict[str, Any]) -> str | int | None:
    """The id of a record; None if it has none. Raises DataError if it is neither a string nor a whole number."""
    given = record.get("id")
    if given is None or (isinstance(given, str | int) and not isinstance(given, bool)):
        return given
    raise DataError(f"expected a string or a whole number in the field 'id', got {type(given).__name__}.")


def size_of(paths: Sequence[Path]) -> int | None:
    """Total size of files in bytes, for a progress bar; None if a part of it is unknown."""
    if any(path == STDIN or path.suffix in (".gz", ".zst") for path in paths):
        return None
    return sum(path.stat().st_size for path in paths)

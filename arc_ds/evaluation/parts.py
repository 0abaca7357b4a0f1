"""The part files of an evaluation: each rank appends its finished batches to a file of its own.

A line of `part_00000.jsonl` is one batch: its number in the plan, digest of the plan, seconds, and predictions. It is
written and synced at once, so a kill at any time loses at most the batch in work. The part files are the state from
which the next start goes on, with any number of ranks.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from arc_ds.errors import DataError
from arc_ds.evaluation.results import Prediction, parse_prediction, prediction_line
from arc_ds.system.files import output

logger = logging.getLogger(__name__)

_PATTERN = "part_*.jsonl"


class FinishedBatch(NamedTuple):
    """A line of a part file."""

    plan: str
    batch: int
    seconds: float
    predictions: tuple[Prediction, ...]


def part_path(folder: Path, rank: int) -> Path:
    """The part file of a rank."""
    return folder / f"part_{rank:05d}.jsonl"


def part_paths(folder: Path) -> list[Path]:
    """The part files of all ranks of all starts."""
    return sorted(folder.glob(_PATTERN))


def read_parts(folder: Path) -> Iterator[FinishedBatch]:
    """Read the finished batches in all part files. A last line that a kill has cut short is left out.

    Raises DataError that names file and line if another line is damaged.
    """
    for path in part_paths(folder):
        try:
            lines = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            continue  # rank 0 has merged and removed it meanwhile
        for number, line in enumerate(lines[:-1], 1):  # a whole line ends with a line break
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
                predictions = tuple(parse_prediction(each, where) for each in record["predictions"])
                yield FinishedBatch(record["plan"], int(record["batch"]), float(record["seconds"]), predictions)
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(
                    f"{where} is no batch of an evaluation ({type(error).__name__}: {error}): another program has "
                    "written the file, or the disk is damaged. Remove the file; its batches are computed again."
                ) from error


@contextmanager
def opened_part(folder: Path, rank: int, num_ranks: int) -> Iterator[BinaryIO]:
    """The part file of this rank, open for appending and locked. Removes a last line that was cut short.

    Rank 0 also checks that no rank of an earlier start, of more ranks, is still writing. Raises DataError if another
    process writes one of these files.
    """
    path = part_path(folder, rank)
    with output(path):
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    with file:
        _lock(file, path)
        if rank == 0:
            for other in part_paths(folder):
                if int(other.stem.removeprefix("part_")) >= num_ranks:
                    with other.open("rb") as theirs:
                        _lock(theirs, other)
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        yield file


def append(file: BinaryIO, finished: FinishedBatch) -> None:
    """Append one batch to a part file and sync it to disk. Raises StorageError if the disk is full."""
    predictions = [json.loads(prediction_line(each)) for each in finished.predictions]
    line = json.dumps({**finished._asdict(), "predictions": predictions}, ensure_ascii=False)
    with output(Path(file.name)):
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(
            f"another evaluation is writing {path}. Wait until it has finished, end it, or give another output."
        ) from None
    except OSError as failure:
        logger.warning("%s: this file system has no locks (%s); run one evaluation at a time", path, failure)

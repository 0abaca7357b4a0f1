"""Rows of measurements: one number each, with its machine, versions and command."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from checkout import commit

MEASURED = Path(__file__).resolve().parent / "measured"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number.

    stage: the program that measured it, such as "fast" or "step".
    subject: the kernel, or the part of the program.
    case: the shape, or the size.
    variant: the implementation or the setting.
    metric: the quantity, such as "forward" or "peak memory".
    value: a number, or a word such as "passed".
    unit: of value and spread, such as "ms" or "GiB".
    spread: half the distance between the quartiles of the repeats.
    ratio: value over the value of ours; for times, above 1 ours is faster.
    share: achieved rate over the rate that was measured in the same run (copies, or matrix products).
    note: remarks for the reader, such as a reduced size.
    """

    stage: str
    subject: str
    case: str = ""
    variant: str = ""
    metric: str = ""
    value: float | str = ""
    unit: str = ""
    spread: float | str = ""
    ratio: float | str = ""
    share: float | str = ""
    note: str = ""


ROW_FIELDS = tuple(field.name for field in fields(Row))


def stamp(command: str) -> dict[str, str]:
    """Date, machine, commit, versions and command of all rows of one process."""
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "gpu": machine_name(),
        "commit": commit(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda or torch.version.hip or ""),
        "triton": version_of("triton"),
        "deepspeed": version_of("deepspeed"),
        "command": command,
    }


def machine_name() -> str:
    """The GPU's name, or "CPU"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def file_name(machine: str) -> str:
    """A machine's name as the stem of its files, such as "nvidia_h200"."""
    return re.sub(r"\W+", "_", machine.lower()).strip("_")


class RowFile:
    """A CSV file. Rows are appended immediately, so an interrupted run keeps its measurements."""

    def __init__(self, path: Path, command: str) -> None:
        """command: the command in the rows, without local paths, such as "tools/gpu_day.py --stages fast"."""
        self.path = path
        self._stamp = stamp(command)

    def append(self, rows: Iterable[Row]) -> None:
        """Append rows to the file. A new file gets a header."""
        append_lines(self.path, [self._stamp | asdict(row) for row in rows])


def append_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Append lines of equal columns to a CSV file. A new file gets a header."""
    if not lines:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(lines)


def version_of(package: str) -> str:
    """The installed version of a package; empty if it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""

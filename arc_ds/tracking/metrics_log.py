"""`metrics.jsonl`: one JSON object per line, `{"step": 10, "time": 1700000000.5, "metrics": {"loss": 2.5}}`.

The file is the complete record of a run's metrics, independent of the tracking server. It is also the queue that feeds
the server (`tracking`). Step numbers in the file never decrease.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

from arc_ds.system.files import output

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class MetricsEntry:
    """One line of the file.

    step: number of optimizer steps done.
    time: seconds since the epoch.
    metrics: values by metric name.
    end: byte offset after the line.
    """

    step: int
    time: float
    metrics: Mapping[str, float]
    end: int


class MetricsLog:
    """Appends to a metrics file. `append` flushes each line to the operating system before it returns."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        """Open the file and remove all entries after the step that the run resumes from (0: remove everything).

        The run repeats these steps. An incomplete last line, left by a kill, is removed as well.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_after(path, resumed_step)
        self._file: BinaryIO = path.open("ab")

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of a step. NaN and infinities are written as Python's JSON encodes them."""
        values = {key: float(value) for key, value in metrics.items()}
        line = json.dumps({"step": step, "time": time.time(), "metrics": values}) + "\n"
        with output(self.path):
            self._file.write(line.encode("utf-8"))
            self._file.flush()

    def close(self) -> None:
        """Close the file. Safe to call more than once."""
        with suppress(OSError):  # `append` has reported what could not be written
            self._file.close()


def read_metrics(path: Path, start: int = 0) -> Iterator[MetricsEntry]:
    """Read entries from byte `start`, up to the first incomplete or invalid line."""
    with path.open("rb") as file:
        file.seek(start)
        end = start
        for line in file:
            end += len(line)
            entry = _parse(line, end)
            if entry is None:
                return
            yield entry


def read_step(path: Path, step: int) -> list[MetricsEntry]:
    """The entries of one step, found by bisection because the steps of the file never decrease."""
    low, high = 0, path.stat().st_size  # the first entry from `step` on starts in [low, high]
    with path.open("rb") as file:
        while low < high:
            middle = (low + high) // 2
            file.seek(max(middle - 1, 0))
            if middle:
                file.readline()  # the rest of a line
            line = file.readline()
            entry = _parse(line, file.tell())
            if entry is None or entry.step >= step:
                high = middle
            else:
                low = entry.end
    return list(takewhile(lambda entry: entry.step == step, read_metrics(path, low)))


def _parse(line: bytes, end: int) -> MetricsEntry | None:
    if not line.endswith(b"\n"):
        return None
    try:
        content = json.loads(line)
        step, seconds, metrics = content["step"], content["time"], dict(content["metrics"])
    except (ValueError, KeyError, TypeError):
        return None
    if not isinstance(step, int) or not all(isinstance(each, int | float) for each in (seconds, *metrics.values())):
        return None
    return MetricsEntry(step=step, time=seconds, metrics=metrics, end=end)


def _cut_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    keep = 0
    for entry in read_metrics(path):
        if entry.step > step or step == 0:
            break
        keep = entry.end
    size = path.stat().st_size
    if size > keep:
        logger.info("%s: removed the last %d bytes; the run repeats all steps after step %d", path, size - keep, step)
        with path.open("r+b") as file:
            file.truncate(keep)

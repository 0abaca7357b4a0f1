"""`metrics.jsonl`: one JSON object a line, `{"step": 10, "time": 1700000000.5, "metrics": {"loss": 2.5}}`.

The run's own record of its metrics, complete whatever becomes of a tracking server, and the queue from which the
server is fed (`tracking`). Steps never decrease along the file.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class MetricsEntry:
    """What was logged at once. step: optimizer steps done; time: seconds since the epoch; end: byte after the line."""

    step: int
    time: float
    metrics: Mapping[str, float]
    end: int


class MetricsLog:
    """Appends to a metrics file; a line is on its way to the disk before `append` returns."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        """Open the file, without what lies beyond the step that the run resumes from (0: all of it goes).

        Those steps are made again. A torn last line, as a kill leaves it, goes too.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_after(path, resumed_step)
        self._file: BinaryIO = path.open("ab")

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of a step. Values are floats; NaN and infinities are kept (as Python's JSON writes them)."""
        values = {key: float(value) for key, value in metrics.items()}
        line = json.dumps({"step": step, "time": time.time(), "metrics": values}) + "\n"
        self._file.write(line.encode("utf-8"))
        self._file.flush()

    def close(self) -> None:
        """Close the file; may be called again."""
        self._file.close()


def read_metrics(path: Path, start: int = 0) -> Iterator[MetricsEntry]:
    """The whole entries from byte `start` on, up to the first line that is torn or no entry."""
    with path.open("rb") as file:
        file.seek(start)
        end = start
        for line in file:
            end += len(line)
            entry = _parse(line, end)
            if entry is None:
                return
            yield entry


def _parse(line: bytes, end: int) -> MetricsEntry | None:
    if not line.endswith(b"\n"):
        return None
    try:
        content = json.loads(line)
        return MetricsEntry(step=content["step"], time=content["time"], metrics=content["metrics"], end=end)
    except (ValueError, KeyError, TypeError):
        return None


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
        logger.info("%s: the last %d bytes lie beyond step %d and are made again", path, size - keep, step)
        with path.open("r+b") as file:
            file.truncate(keep)

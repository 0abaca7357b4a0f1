"""The context that every stage gets."""

from __future__ import annotations

import json
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_timing import Ceilings, measure_ceilings
from rows import Row, RowFile, file_name, machine_name

ROOT = Path(__file__).resolve().parents[2]
TRACEBACKS = "tracebacks.txt"


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """The context of one stage.

    stage: name of the stage, written to its rows.
    device: device that the stage measures.
    rehearse: whether to run everything at toy size, on the CPU.
    out: folder of the results.
    rows: file to which rows are appended.
    deadline: time on the clock of `time.monotonic` after which the stage starts no new work.
    """

    stage: str
    device: torch.device
    rehearse: bool
    out: Path
    rows: RowFile
    deadline: float

    @staticmethod
    def of(stage: str, *, rehearse: bool, out: Path, seconds: float) -> StageContext:
        """The context of a stage that has `seconds` from now on."""
        return StageContext(
            stage=stage,
            device=torch.device("cpu" if rehearse else "cuda"),
            rehearse=rehearse,
            out=out,
            rows=RowFile(rows_path(out), f"tools/gpu_day.py --stages {stage}{' --rehearse' if rehearse else ''}"),
            deadline=time.monotonic() + seconds,
        )

    def seconds_left(self) -> float:
        """Time until the deadline; negative after it."""
        return self.deadline - time.monotonic()

    def add(self, subject: str, metric: str, value: float | str, unit: str = "", **others: Any) -> None:
        """Append one row to the file and print it. others: the other fields of `Row`."""
        row = Row(stage=self.stage, subject=subject, metric=metric, value=value, unit=unit, **others)
        self.rows.append([row])
        words = (row.subject, row.case, row.variant, row.metric, f"{row.value} {row.unit}".strip(), row.note)
        print(" | ".join(filter(None, words)), flush=True)

    def result(self, subject: str, value: str, note: str = "", *, case: str = "", variant: str = "") -> None:
        """Append a row whose value is a word, such as "passed"."""
        self.add(subject, "result", value, case=case, variant=variant, note=one_line(note))

    def failure(self, subject: str, error: BaseException) -> None:
        """Append one row for an exception, and its traceback to a file."""
        with (self.out / TRACEBACKS).open("a", encoding="utf-8") as file:
            file.write(f"== {self.stage}: {subject}\n{''.join(traceback.format_exception(error))}\n")
        self.result(subject, "failed", f"{type(error).__name__}: {error}")

    def measure_ceilings(self) -> Ceilings:
        """Measure the ceilings of this GPU and keep them for the stages that follow."""
        sizes = {"copy_bytes": 1 << 20, "matrix_size": 64} if self.rehearse else {}
        ceilings = measure_ceilings(self.device, **sizes)
        self._ceilings_file.write_text(json.dumps(ceilings._asdict()))
        return ceilings

    def ceilings(self) -> Ceilings | None:
        """Copy bandwidth and matrix rate of this GPU as a stage has measured them; None before."""
        return Ceilings(**json.loads(self._ceilings_file.read_text())) if self._ceilings_file.exists() else None

    @property
    def _ceilings_file(self) -> Path:
        """One file per GPU: the folder of results may hold those of several."""
        return self.rows.path.with_suffix(".ceilings.json")


def rows_path(out: Path) -> Path:
    """The file of this machine's rows in a folder of results."""
    return out / f"{file_name(machine_name())}.csv"


def one_line(text: str) -> str:
    """A text without line breaks, cut to a length that a table can hold."""
    flat = " ".join(text.split())
    return flat if len(flat) <= 300 else f"{flat[:299]}…"

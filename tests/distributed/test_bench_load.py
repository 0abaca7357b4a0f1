"""The benchmark of loading measures both ways in new processes."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import bench_load
import pytest

pytestmark = pytest.mark.distributed


def test_both_ways_are_measured_and_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "rows.csv"
    sizes = ["--gb", "0.005", "--hidden", "256", "--ranks", "2", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_load.py", "--folder", str(tmp_path / "model"), *sizes, "--out", str(out)])
    assert bench_load.main() == 0
    own, broadcast = csv.DictReader(out.open())
    assert (own["method"], broadcast["method"]) == bench_load.METHODS
    size = float(own["checkpoint_gb"])
    assert float(broadcast["read_gb"]) == pytest.approx(size, abs=0.001)
    assert float(own["read_gb"]) == pytest.approx(size / 2, abs=0.001)
    assert min(float(row["mb_per_s"]) for row in (own, broadcast)) > 0  # seconds are rounded, and may be 0

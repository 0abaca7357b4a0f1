"""The benchmark of the export exports its own checkpoint and states memory and times."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[3] / "tools" / "bench_export.py"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the benchmark reads /proc")
def test_a_row_per_export(tmp_path: Path) -> None:
    options = ["--gb", "0.001", "--width", "32", "--world-size", "2", "--dtype", "bfloat16", "--average", "2"]
    words = [sys.executable, str(TOOL), *options, "--format", "arc-ds", "--csv", "rows.csv"]
    subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    with (tmp_path / "rows.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["world_size"], row["average"], row["largest_mb"]) == ("2", "2", "4.1")  # 64,000 x 32 in bfloat16
    assert (
        float(row["weights_mb"]) / 2 <= float(row["exported_mb"]) < float(row["weights_mb"]) < float(row["shards_mb"])
    )
    assert float(row["seconds"]) > 0 and float(row["cp_export_s"]) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]

"""The benchmark of generation answers the same prompts in five ways; all but the first end at a stop."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from arc_ds.export.formats import write_export
from tests.helpers.tiny_data import TEXT
from tests.helpers.tiny_export import tiny_trained, write_decoder

TOOL = Path(__file__).parents[3] / "tools" / "bench_generate.py"


def test_rows_of_five_ways(tmp_path: Path) -> None:
    write_export(tiny_trained(tmp_path / "run"), tmp_path / "export")
    (tmp_path / "text.txt").write_text(TEXT * 20)
    words = ["--model", str(tmp_path / "export"), "--decoder", str(write_decoder(tmp_path / "decoder"))]
    sizes = ["--text", str(tmp_path / "text.txt"), "--characters", "101", "--samples", "5", "--batch", "3"]
    options = ["--limit", "4", "--dtype", "float64", "--out", str(tmp_path / "rows.csv")]
    done = subprocess.run([sys.executable, str(TOOL), *words, *sizes, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [row["way"] for row in rows] == ["plain", "stop", "leaving", "prefix", "vectors"]
    assert all(float(row["answers_per_s"]) > 0 and row["machine"] and row["command"] for row in rows)
    assert [row["same_answers"] for row in rows if row["way"] != "leaving"] == ["1.0"] * 4
    assert float(rows[0]["speedup"]) == 1.0

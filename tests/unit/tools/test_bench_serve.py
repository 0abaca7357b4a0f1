"""The benchmark of the server reads every document in three ways, and only vectors make its prompts short."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

from arc_ds.export.formats import write_export
from tests.helpers.tiny_data import TEXT
from tests.helpers.tiny_export import tiny_trained, write_decoder

TOOL = Path(__file__).parents[3] / "tools" / "bench_serve.py"


def test_rows_of_three_ways(tmp_path: Path) -> None:
    write_export(tiny_trained(tmp_path / "run"), tmp_path / "export")
    (tmp_path / "text.txt").write_text(TEXT * 20)
    words = ["--model", str(tmp_path / "export"), "--decoder", str(write_decoder(tmp_path / "decoder"))]
    sizes = ["--text", str(tmp_path / "text.txt"), "--characters", "101", "--requests", "6", "--tokens", "3"]
    command = [sys.executable, str(TOOL), *words, *sizes, "--out", str(tmp_path / "rows.csv")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text, new, cached = csv.DictReader((tmp_path / "rows.csv").open())
    assert [row["way"] for row in (text, new, cached)] == ["text", "new", "cached"]
    assert float(text["prompt_rows"]) > float(new["prompt_rows"]) == float(cached["prompt_rows"])
    assert float(text["encoder_tokens"]) == 0 < float(new["encoder_tokens"])
    assert all(float(row["requests_per_s"]) > 0 and float(row["first_token_p95_ms"]) > 0 for row in (text, new, cached))

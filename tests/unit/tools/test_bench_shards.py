"""The benchmark of the shard tools measures all processes, and its input has the requested size."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.tiny_data import write_tiktoken

TOOL = Path(__file__).parents[3] / "tools" / "bench_shards.py"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the benchmark reads /proc")
def test_rows_of_build_and_check(tmp_path: Path) -> None:
    tokenizer = write_tiktoken(tmp_path / "tokenizer.model")
    words = [sys.executable, str(TOOL), "--tokenizer", str(tokenizer), "--mb", "0.3", "--folder", str(tmp_path)]
    done = subprocess.run([*words, "--workers", "1"], capture_output=True, text=True, check=True)
    build, check = csv.DictReader(done.stdout.splitlines())
    assert (build["command"], check["command"], build["input_mb"]) == ("build", "check", "0.3")
    assert float(build["peak_mib"]) >= float(build["peak_own_mib"]) > 10
    assert float(build["seconds"]) > 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]

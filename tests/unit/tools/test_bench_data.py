"""The throughput benchmark measures both ways of getting ids, and removes its caches before the next measurement."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.tiny_data import TEXT, write_tiktoken


def test_rows_of_both_ways_are_appended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "")  # the program sets these variables; restore them afterwards
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    (tmp_path / "text.txt").write_text(TEXT * 200)
    tokenizer, out = write_tiktoken(tmp_path / "tokenizer.model"), tmp_path / "rows.csv"
    options = ["--tokenizer", f"tiny={tokenizer}", "--text", str(tmp_path / "text.txt"), "--out", str(out)]
    sizes = ["--steps", "2", "--repeats", "2", "--batch-size", "4", "--shards", str(tmp_path / "shards"), "--profile"]
    monkeypatch.setattr(sys, "argv", ["bench_data.py", *options, *sizes])
    import bench_data
    for number in (1, 2):
        assert bench_data.main() == 0
        rows = list(csv.DictReader(out.open()))
        assert [row["ids"] for row in rows] == ["on the fly", "cached"] * number
    for row in rows:
        assert float(row["encoder_tokens_per_s"]) > float(row["records_per_s"]) > 0
        assert float(row["decoder_rows_per_s"]) > 0
    printed = capsys.readouterr().out
    assert "encoder tokens/s" in printed
    for stage in ("token cache", "tokenising", "making samples", "packing", "order and dealing"):
        assert stage in printed
    assert not list((tmp_path / "shards").glob("*/tokens-*"))

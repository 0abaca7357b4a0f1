"""Statistics of shards: every record is in one bin, shares match the manifest, and a picture is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arc_ds.cli import main
from arc_ds.commands.shards.length_stats import describe, length_histogram
from arc_ds.shards.building.writer import build_shards
from arc_ds.shards.reader import ShardSet
from tests.helpers.tiny_data import TEXT, write_lines, write_tiktoken


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=50))
def test_every_record_is_in_the_bin_of_its_length(lengths: list[int]) -> None:
    width, bins = length_histogram(np.array(lengths, dtype=np.int32))
    assert len(bins) <= 16 and bins[-1] > 0
    for idx, count in enumerate(bins):
        assert count == sum(idx * width < length <= (idx + 1) * width for length in lengths)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = write_tiktoken(tmp_path / "tokenizer.model")
    (tmp_path / "in").mkdir()
    texts = {"a.jsonl": [TEXT * 9, TEXT, "x"], "b.jsonl": [TEXT, " "], "c.jsonl": [TEXT]}
    for name, found in texts.items():
        write_lines(tmp_path / "in" / name, [{"text": text} for text in found])
    build_shards([tmp_path / "in"], tmp_path / "shards", tokenizer, max_tokens=512)
    return tmp_path / "shards"


def test_what_was_cut_and_left_out_is_told_with_its_share(folder: Path) -> None:
    shards = ShardSet(folder)
    lines = describe("x", shards.manifest, shards.num_tokens, max_sources=1).splitlines()
    assert lines[0].startswith(f"x: {len(shards)} pretraining records, {sum(shards.num_tokens)} tokens, 1 shards")
    assert "documents: 6" in lines
    assert "  cut to records of at most 512 tokens: 1 (16.7%)" in lines
    assert "  left out, empty: 1 (16.7%)" in lines
    assert "  left out, of too few tokens: 1 (16.7%)" in lines
    tokens = shards.manifest.sources[0].tokens
    share = f"{tokens} ({tokens / sum(shards.num_tokens):.1%}) tokens"
    records = shards.manifest.sources[0].records
    assert f"  a.jsonl: {share}, {records} records of 3 documents, 1 cut, 1 left out" in lines
    assert any(line.startswith("  2 others: ") for line in lines)


def test_stats_prints_and_draws(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = folder.parent / "lengths.png"
    assert main(["shards", "stats", str(folder), "--png", str(picture)]) == 0
    assert "█" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["shards", "stats", str(folder), "--png", str(folder / "none" / "a.png")]) == 2
    assert "cannot be written" in capsys.readouterr().err

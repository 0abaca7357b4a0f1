"""Building shards: every input is read, nothing is lost, the bytes are deterministic, faults are named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from arc_ds.data.shard_reader import ShardSet
from arc_ds.data.shard_writer import build_shards
from arc_ds.errors import DataError
from tests.helpers.tiny_data import TEXT, numbered_texts, write_shards, write_tiktoken


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiktoken(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def test_same_input_gives_the_same_bytes(tmp_path: Path, tokenizer_path: Path) -> None:
    (tmp_path / "a").mkdir()
    first = write_shards(tmp_path / "a" / "x", tokenizer_path, numbered_texts(9))
    (tmp_path / "b").mkdir()
    second = write_shards(tmp_path / "b" / "x", tokenizer_path, numbered_texts(9))
    names = sorted(path.name for path in first.folder.iterdir())
    assert names == sorted(path.name for path in second.folder.iterdir())
    assert all((first.folder / name).read_bytes() == (second.folder / name).read_bytes() for name in names)
    assert first.fingerprint == second.fingerprint


def test_every_kind_of_input_is_read_and_short_documents_counted(tmp_path: Path, tokenizer_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.txt").write_text(TEXT, encoding="utf-8")
    (source / "b.jsonl").write_text(json.dumps({"body": TEXT}) + "\n\n" + json.dumps({"body": " \n"}) + "\n")
    with gzip.open(source / "c.jsonl.gz", "wt") as file:
        file.write(json.dumps({"body": "x"}) + "\n" + json.dumps({"body": TEXT}) + "\n")
    manifest = build_shards([source], tmp_path / "out", tokenizer_path, min_tokens=4, text_field="body")
    assert [(s.name, s.documents, s.skipped) for s in manifest.sources] == [
        ("a.txt", 1, {}),
        ("b.jsonl", 2, {"empty": 1}),
        ("c.jsonl.gz", 2, {"min_tokens": 1}),
    ]
    assert manifest.samples == 3
    assert manifest.skipped == {"empty": 1, "min_tokens": 1}


def test_existing_folder_is_kept_unless_asked(tmp_path: Path, tokenizer_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text(TEXT)
    out = tmp_path / "out"
    build_shards([source], out, tokenizer_path)
    with pytest.raises(DataError, match="exists"):
        build_shards([source], out, tokenizer_path)
    source.write_text(TEXT * 2)
    build_shards([source], out, tokenizer_path, overwrite=True)
    assert ShardSet(out).record(0)["text"] == TEXT * 2
    other = tmp_path / "photos"
    other.mkdir()
    (other / "me.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="not a folder of shards"):
        build_shards([source], other, tokenizer_path, overwrite=True)


def test_failed_build_leaves_nothing(tmp_path: Path, tokenizer_path: Path) -> None:
    good, bad = tmp_path / "a.txt", tmp_path / "b.txt"
    good.write_text(TEXT)
    bad.write_bytes(b"\xff\xfe broken")
    with pytest.raises(DataError, match=r"b\.txt.*UTF-8"):
        build_shards([good, bad], tmp_path / "out", tokenizer_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "line 2: expected JSON"),
        ('{"body": "a"}', r"line 2: expected a string in the field 'text', got the fields \['body'\]"),
        ('{"text": 3}', "line 2"),
        ('["text"]', "line 2"),
        ('{"text": "a lone \\ud800 surrogate of the sea"}', "line 2"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, tokenizer_path: Path, line: str, message: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"text": TEXT}) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        build_shards([source], tmp_path / "out", tokenizer_path)


def test_inputs_without_a_record_or_missing_are_errors(tmp_path: Path, tokenizer_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="no record"):
        build_shards([tmp_path / "empty.txt"], tmp_path / "out", tokenizer_path)
    with pytest.raises(DataError, match="missing"):
        build_shards([tmp_path / "none.txt"], tmp_path / "out", tokenizer_path)
    with pytest.raises(DataError, match="min_tokens"):
        build_shards([tmp_path / "empty.txt"], tmp_path / "out", tokenizer_path, max_tokens=8, min_tokens=5)

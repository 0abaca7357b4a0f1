"""Shards: no text is lost, bytes are deterministic, stock webdataset reads them, and every fault is found."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arc_ds.errors import DataError, StorageError
from arc_ds.shards.check import check_shards
from arc_ds.shards.reader import ShardSet
from arc_ds.tokenizers import Tokenizer, load_tokenizer
from tests.helpers.tiny_data import numbered_texts, write_shards, write_tiktoken


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiktoken(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


@pytest.fixture
def shards(tmp_path: Path, tokenizer_path: Path) -> ShardSet:
    return write_shards(tmp_path / "shards", tokenizer_path, numbered_texts(40))


def test_records_come_back_with_their_token_counts(shards: ShardSet, tokenizer: Tokenizer) -> None:
    texts = numbered_texts(40)
    assert len(shards.manifest.shards) > 2
    assert [shards.record(idx)["text"] for idx in range(len(shards))] == texts
    assert [shards.tokens(idx) for idx in range(len(shards))] == [len(tokenizer.encode(text)) for text in texts]
    assert list(check_shards(shards.folder)) == []


def test_stock_webdataset_reads_the_shards(shards: ShardSet) -> None:
    webdataset = pytest.importorskip("webdataset")
    urls = [str(shards.folder / shard.name) for shard in shards.manifest.shards]
    read = [json.loads(sample["json"]) for sample in webdataset.WebDataset(urls, shardshuffle=False)]
    assert read == [shards.record(idx) for idx in range(len(shards))]


def test_pickled_set_reads_again(shards: ShardSet) -> None:
    shards.record(0)
    assert pickle.loads(pickle.dumps(shards)).record(3) == shards.record(3)


def damage(path: Path, offset: int, new: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(new)] = new
    path.write_bytes(raw)


def test_flipped_byte_is_found_when_the_record_is_read(shards: ShardSet) -> None:
    path = shards.folder / shards.manifest.shards[0].name
    damage(path, 512 + 12, b"\x00")
    again = ShardSet(shards.folder)
    with pytest.raises(DataError, match=r"shard-000000\.tar, member 000000000\.json at byte 512: the checksum"):
        again.record(0)
    assert again.record(1)["text"] == numbered_texts(2)[1]
    faults = [str(fault) for fault in check_shards(shards.folder)]
    assert any("sha256" in fault for fault in faults)
    assert any("at byte 512" in fault and "checksum" in fault for fault in faults)


def test_damaged_tar_header_is_found_by_check(shards: ShardSet) -> None:
    damage(shards.folder / "shard-000001.tar", 257, b"USTAR")
    assert any("tar header" in str(fault) for fault in check_shards(shards.folder))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("shard-000001.tar", lambda p: p.write_bytes(p.read_bytes()[:-700]), "cut short"),
        ("shard-000001.tar", lambda p: p.unlink(), "missing"),
        ("shard-000001.idx", lambda p: p.unlink(), "index of shard-000001.tar is missing"),
        ("shard-000001.idx", lambda p: damage(p, 140, b"\xff"), "sha256"),
        ("manifest.json", lambda p: p.unlink(), "no manifest.json"),
        ("manifest.json", lambda p: p.write_text("{"), "damaged"),
        ("manifest.json", lambda p: p.write_text(p.read_text().replace('"version": 3', '"version": 9')), "version 3"),
        ("manifest.json", lambda p: p.write_text(p.read_text().replace('"samples": 40', '"samples": 7')), "7 samples"),
    ],
)
def test_damaged_folder_is_refused_when_opened(shards: ShardSet, name: str, change, message: str) -> None:
    change(shards.folder / name)
    with pytest.raises(DataError, match=message):
        ShardSet(shards.folder)


def test_a_shard_that_is_gone_when_it_is_wanted_is_an_error_with_its_path(shards: ShardSet) -> None:
    tar = shards.folder / shards.manifest.shards[0].name
    tar.unlink()
    with pytest.raises(StorageError, match=rf"{tar.name} cannot be opened: .*No such file.*still mounted"):
        shards.record(0)


def test_check_names_every_fault_at_once(shards: ShardSet) -> None:
    tar = shards.folder / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:1500])
    (shards.folder / "shard-000002.idx").unlink()
    (shards.folder / "stray").write_text("x")
    files = {fault.file for fault in check_shards(shards.folder)}
    assert files == {"shard-000001.tar", "shard-000002.idx", "stray"}


def test_headers_of_indexes_are_read_one_at_a_time(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several threads open many shards at once, where CPython may raise an error (gh-106905)."""
    folder = write_shards(tmp_path / "many", tokenizer_path, numbered_texts(60), shard_bytes=1 << 10).folder
    load, inside, most = np.load, [], []

    def slow_load(*args: Any, **options: Any) -> Any:
        inside.append(None)
        most.append(len(inside))
        time.sleep(0.001)
        inside.pop()
        return load(*args, **options)

    monkeypatch.setattr(np, "load", slow_load)
    opened = ShardSet(folder)
    assert len(most) == len(opened.manifest.shards) >= 16, "enough shards to use several threads"
    assert set(most) == {1}

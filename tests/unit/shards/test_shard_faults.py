"""Records are read as written. Every fault of a shard raises a specific error, and none passes as data or its end."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arc_ds.errors import DataError, StorageError
from arc_ds.shards.check import check_shards
from arc_ds.shards.format import MANIFEST, Manifest, read_manifest, sha256_of_file
from arc_ds.shards.reader import ShardSet
from arc_ds.shards.records import encode_record
from arc_ds.shards.tar_writer import EncodedRecord, ShardWriter
from arc_ds.tokenizers import load_tokenizer
from tests.helpers.tiny_data import numbered_texts, write_shards
from tests.helpers.tiny_mixture import TinyMixture

TEXTS = numbered_texts(40)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> ShardSet:
    return write_shards(tmp_path_factory.mktemp("data") / "shards", tokenizer_path, TEXTS)


@pytest.fixture
def folder(whole: ShardSet, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole.folder, tmp_path / "shards"))


def write_raw(folder: Path, payloads: list[bytes]) -> ShardSet:
    """A set of one shard with arbitrary payloads and correct checksums."""
    folder.mkdir()
    with ShardWriter(folder, 1 << 40) as writer:
        for payload in payloads:
            writer.write(EncodedRecord(payload, 1))
    manifest = Manifest(
        samples=len(payloads),
        tokens=len(payloads),
        max_tokens=1,
        min_tokens=1,
        tokenizer_fingerprint="none",
        shards=tuple(writer.shards),
        sources=(),
    )
    (folder / MANIFEST).write_text(manifest.to_json())
    return ShardSet(folder)


def write_manifest(folder: Path, **changes: object) -> None:
    """Change fields of the manifest."""
    (folder / MANIFEST).write_text(replace(read_manifest(folder), **changes).to_json())


def change_manifest(folder: Path, shard_idx: int, **changes: object) -> None:
    """Change a shard's entry in the manifest and keep the manifest consistent."""
    shards = list(read_manifest(folder).shards)
    shards[shard_idx] = replace(shards[shard_idx], **changes)
    write_manifest(folder, shards=tuple(shards), samples=sum(shard.samples for shard in shards))


def overwrite(path: Path, offset: int, new: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(new)


def test_records_come_back_with_their_token_counts(whole: ShardSet, tokenizer_path: Path) -> None:
    encode = load_tokenizer(tokenizer_path).encode
    assert len(whole.manifest.shards) > 2
    assert [whole.record(idx)["text"] for idx in range(len(whole))] == TEXTS
    assert [whole.tokens(idx) for idx in range(len(whole))] == [len(encode(text)) for text in TEXTS]
    assert list(check_shards(whole.folder)) == []


def test_a_flipped_byte_is_found_when_the_record_is_read(folder: Path) -> None:
    overwrite(folder / "shard-000000.tar", 512 + 12, b"\x00")
    shards = ShardSet(folder)
    with pytest.raises(DataError, match=r"shard-000000\.tar, member 000000000\.json at byte 512: the checksum"):
        shards.record(0)
    assert shards.record(1)["text"] == TEXTS[1]
    whole_file, member = (str(fault) for fault in check_shards(folder))
    assert "sha256" in whole_file and "at byte 512: the member's checksum" in member


def test_a_missing_member_is_one_damaged_record_and_its_neighbours_are_read(folder: Path) -> None:
    """Stock readers stop silently at a hole of zeros."""
    shards = ShardSet(folder)
    offset = 512 + -(-len(encode_record({"text": TEXTS[0]})) // 512) * 512 + 512
    overwrite(folder / "shard-000000.tar", offset - 512, bytes(512 + len(encode_record({"text": TEXTS[1]}))))
    with pytest.raises(
        DataError, match=rf"shard-000000\.tar, member \? at byte {offset}: the checksum .*on_error: skip"
    ):
        shards.record(1)
    assert [shards.record(idx)["text"] for idx in range(40) if idx != 1] == TEXTS[:1] + TEXTS[2:]
    faults = [str(fault) for fault in check_shards(folder)]
    assert len(faults) == 2
    assert faults[1] == f"shard-000000.tar at byte {offset - 512}: the tar header does not agree with the index"


def write_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")


def replace_text(old: str, new: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("shard-000001.tar", lambda path: path.write_bytes(path.read_bytes()[:-700]), "cut short"),
        ("shard-000001.tar", Path.unlink, "missing"),
        ("shard-000001.tar", write_pointer, "tar is a pointer of Git LFS"),
        ("shard-000001.idx", write_pointer, "idx is a pointer of Git LFS"),
        ("shard-000001.idx", Path.unlink, "index of shard-000001.tar is missing"),
        ("shard-000001.idx", lambda path: overwrite(path, 140, b"\xff"), "sha256"),
        ("manifest.json", Path.unlink, "no manifest.json"),
        ("manifest.json", lambda path: path.write_text("{"), "damaged"),
        ("manifest.json", lambda path: path.write_bytes(b"\xff\xfe"), "damaged .UnicodeDecodeError"),
        ("manifest.json", replace_text('"version": 3', '"version": 9'), "format arc-ds-shards version 3"),
        ("manifest.json", replace_text('"samples": 40', '"samples": 7'), "7 samples"),
        (
            "manifest.json",
            replace_text('"name": "shard-000001.tar"', '"name": "../../etc/passwd"'),
            r"damaged \(ValueError: the shard '\.\./\.\./etc/passwd'",
        ),
        ("", lambda folder: write_manifest(folder, samples=0, shards=()), "has 0 samples"),
        ("", lambda folder: change_manifest(folder, 1, samples=3), r"shard-000001\.idx: expected 3 rows, got"),
        ("", lambda folder: change_manifest(folder, 1, bytes=4096), r"shard-000001\.tar: expected 4096 bytes, got"),
        ("", lambda folder: change_manifest(folder, 1, index_sha256="0" * 64), r"\.idx: expected sha256 0000"),
    ],
)
def test_a_damaged_folder_or_a_manifest_that_disagrees_is_refused_when_opened(
    folder: Path, name: str, change: Callable[[Path], object], message: str
) -> None:
    change(folder / name)
    with pytest.raises(DataError, match=message):
        ShardSet(folder)


def test_check_names_every_fault_at_once(folder: Path) -> None:
    tar = folder / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:1500])
    (folder / "shard-000002.idx").unlink()
    (folder / "stray").write_text("x")
    assert {fault.file for fault in check_shards(folder)} == {"shard-000001.tar", "shard-000002.idx", "stray"}


def test_a_wrong_sum_of_a_tar_is_found_by_check(folder: Path) -> None:
    change_manifest(folder, 1, sha256="0" * 64)
    assert [str(fault) for fault in check_shards(folder)] == [
        "shard-000001.tar: its sha256 does not match the manifest"
    ]


def test_an_index_of_another_shard_gives_no_wrong_record(folder: Path) -> None:
    """Even if the manifest was changed to match."""
    shutil.copy(folder / "shard-000000.idx", folder / "shard-000001.idx")
    first = read_manifest(folder).shards[0]
    change_manifest(folder, 1, samples=first.samples, index_sha256=sha256_of_file(folder / "shard-000001.idx"))
    shards = ShardSet(folder)
    for idx in range(first.samples, 2 * first.samples):
        with pytest.raises(DataError, match=r"shard-000001\.tar, member .* the checksum does not match the index"):
            shards.record(idx)
    assert len(list(check_shards(folder))) == first.samples


def test_an_index_that_is_no_array_is_refused(folder: Path) -> None:
    (folder / "shard-000001.idx").write_bytes(b"nothing of the kind")
    change_manifest(folder, 1, index_sha256=sha256_of_file(folder / "shard-000001.idx"))
    with pytest.raises(DataError, match=r"shard-000001\.idx: expected an \.npy array"):
        ShardSet(folder)


@pytest.mark.parametrize(
    ("payload", "message"), [(b'{"text": 3}', "expected a string in the field 'text', got int"), (b"", "expected JSON")]
)
def test_a_record_that_is_none_is_named_with_its_place(tmp_path: Path, payload: bytes, message: str) -> None:
    shards = write_raw(tmp_path / "raw", [encode_record({"text": "good"}), payload])
    with pytest.raises(DataError, match=rf"shard-000000\.tar, member 000000001\.json at byte 1536: {message}"):
        shards.record(1)
    assert shards.record(0) == {"text": "good"}
    assert [fault.offset for fault in check_shards(shards.folder)] == [1536]


def test_a_shard_deleted_under_a_reader_is_read_to_its_end_and_an_unopened_one_is_an_error(folder: Path) -> None:
    shards = ShardSet(folder)
    shards.record(0)
    for path in folder.glob("*.tar"):
        path.unlink()
    first = int(shards.shard_sizes[0])
    assert [shards.record(idx)["text"] for idx in range(first)] == TEXTS[:first]
    with pytest.raises(StorageError, match=r"shard-000001\.tar cannot be opened: No such file.*still mounted"):
        shards.record(first)


def test_files_built_again_under_a_reader_are_not_mixed_with_the_old(folder: Path) -> None:
    shards = ShardSet(folder)
    first = int(shards.shard_sizes[0])
    (folder / "shard-000001.tar").write_bytes(b"x" * 100)
    with pytest.raises(StorageError, match=r"shard-000001\.tar has 100 bytes, but had \d+ before"):
        shards.record(first)
    for num_bytes in (100, 0):
        (folder / "shard-000002.idx").write_bytes(b"x" * num_bytes)
        with pytest.raises(StorageError, match=rf"shard-000002\.idx has {num_bytes} bytes, fewer than before"):
            shards.record(first + int(shards.shard_sizes[1]))


def test_a_lost_shard_stops_a_run_that_skips_damaged_records(tmp_path: Path) -> None:
    """It must not count as a damaged record: a run must read the same records even if a disk or server fails."""
    mixture = TinyMixture.write(tmp_path)
    data = mixture.data(on_error="skip")
    data[0]
    for path in mixture.folder.glob("*/*.tar"):
        path.unlink()
    with pytest.raises(StorageError, match="cannot be opened"):
        for step in range(20):
            data[step]


def test_stock_webdataset_shares_the_shards_among_its_workers(whole: ShardSet) -> None:
    webdataset = pytest.importorskip("webdataset")
    urls = [str(whole.folder / shard.name) for shard in whole.manifest.shards]
    stream = webdataset.WebDataset(urls, shardshuffle=False)
    loader = webdataset.WebLoader(stream, num_workers=2, batch_size=None)
    read = [(sample["__key__"], json.loads(sample["json"])["text"]) for sample in loader]
    assert sorted(read) == [(f"{idx:09d}", text) for idx, text in enumerate(TEXTS)]


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

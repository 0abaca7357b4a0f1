"""Every fault of a shard raises a specific error. No fault passes as data, end of file or a fault of one record."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from arc_ds.errors import DataError, StorageError
from arc_ds.shards.check import check_shards
from arc_ds.shards.format import INDEX_DTYPE, MANIFEST, Manifest, ShardInfo, read_manifest, sha256_of_file
from arc_ds.shards.reader import ShardSet
from arc_ds.shards.records import MAX_RECORD_BYTES, encode_record
from arc_ds.shards.tar_writer import EncodedRecord, ShardWriter
from tests.helpers.tiny_data import numbered_texts, write_shards, write_tiktoken
from tests.helpers.tiny_mixture import TinyMixture

TEXTS = numbered_texts(40)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("data")
    return write_shards(folder / "shards", write_tiktoken(folder / "t.model"), TEXTS)


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


def change_manifest(folder: Path, shard_idx: int, **changes: object) -> None:
    """Change a shard's entry in the manifest and keep the manifest consistent."""
    manifest = read_manifest(folder)
    shards: list[ShardInfo] = list(manifest.shards)
    shards[shard_idx] = replace(shards[shard_idx], **changes)  # type: ignore[arg-type]
    samples = sum(shard.samples for shard in shards)
    (folder / MANIFEST).write_text(replace(manifest, shards=tuple(shards), samples=samples).to_json())


def wipe(path: Path, begin: int, length: int) -> None:
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(bytes(length))


def test_a_missing_member_is_one_damaged_record_and_its_neighbours_are_read(folder: Path) -> None:
    """Stock readers stop silently at a hole of zeros."""
    shards = ShardSet(folder)
    offset = 512 + -(-len(encode_record({"text": TEXTS[0]})) // 512) * 512 + 512
    wipe(folder / "shard-000000.tar", offset - 512, 512 + len(encode_record({"text": TEXTS[1]})))
    with pytest.raises(
        DataError, match=rf"shard-000000\.tar, member \? at byte {offset}: the checksum .*on_error: skip"
    ):
        shards.record(1)
    assert [shards.record(idx)["text"] for idx in range(40) if idx != 1] == TEXTS[:1] + TEXTS[2:]
    faults = [str(fault) for fault in check_shards(folder)]
    assert len(faults) == 2
    assert faults[1] == f"shard-000000.tar at byte {offset - 512}: the tar header does not agree with the index"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: change_manifest(folder, 1, samples=3), r"shard-000001\.idx: expected 3 rows, got"),
        (lambda folder: change_manifest(folder, 1, bytes=4096), r"shard-000001\.tar: expected 4096 bytes, got"),
        (lambda folder: change_manifest(folder, 1, index_sha256="0" * 64), r"shard-000001\.idx: expected sha256 0000"),
        (
            lambda folder: shutil.copy(folder / "shard-000000.idx", folder / "shard-000001.idx"),
            r"shard-000001\.idx: expected sha256",
        ),
        (
            lambda folder: (folder / MANIFEST).write_text(
                (folder / MANIFEST).read_text().replace('"name": "shard-000001.tar"', '"name": "../../etc/passwd"')
            ),
            r"damaged \(ValueError: the shard '\.\./\.\./etc/passwd'",
        ),
        (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), "damaged .UnicodeDecodeError"),
    ],
)
def test_a_manifest_that_disagrees_is_refused_when_opened(
    folder: Path, change: Callable[[Path], object], message: str
) -> None:
    change(folder)
    with pytest.raises(DataError, match=message):
        ShardSet(folder)


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
    ("payload", "message"),
    [
        (b'{"text": "\xff\xfe"}', "expected JSON in UTF-8"),
        (b'{"text": "cut', "expected JSON in UTF-8"),
        (b"[1]", "expected a JSON object, got list"),
        (b'{"text": 3}', "expected a string in the field 'text', got int"),
        (b'{"text": ""}', "expected a non-empty string"),
        (b'{"title": "x"}', r"expected a string in the field 'text', got the fields \['title'\]"),
        (b"", "expected JSON in UTF-8"),
    ],
)
def test_a_record_that_is_none_is_named_with_its_place(tmp_path: Path, payload: bytes, message: str) -> None:
    shards = write_raw(tmp_path / "raw", [encode_record({"text": "good"}), payload])
    with pytest.raises(DataError, match=rf"shard-000000\.tar, member 000000001\.json at byte 1536: {message}"):
        shards.record(1)
    assert shards.record(0) == {"text": "good"}
    assert [fault.offset for fault in check_shards(shards.folder)] == [1536]


def test_a_record_of_100_megabytes_is_refused_unparsed(tmp_path: Path) -> None:
    size = 100_000_000
    shards = write_raw(tmp_path / "raw", [b'{"text":"' + b"x" * (size - 11) + b'"}', encode_record({"text": "good"})])
    with pytest.raises(DataError, match=rf"a record of {size} bytes; expected at most {MAX_RECORD_BYTES}"):
        shards.record(0)
    assert shards.record(1) == {"text": "good"}


def test_an_empty_shard_holds_no_record_and_shifts_none(tmp_path: Path) -> None:
    folder = tmp_path / "three"
    sets = [write_raw(tmp_path / name, [encode_record({"text": name})]) for name in ("a", "b", "c")]
    folder.mkdir()
    shards = []
    for idx, one in enumerate(sets):
        shard = replace(one.manifest.shards[0], name=f"shard-{idx}.tar")
        shutil.copy(one.folder / "shard-000000.tar", folder / shard.name)
        shutil.copy(one.folder / "shard-000000.idx", folder / shard.index_name)
        shards.append(shard)
    with (folder / "shard-1.idx").open("wb") as file:
        np.save(file, np.empty(0, dtype=INDEX_DTYPE))
    shards[1] = replace(shards[1], samples=0, tokens=0, index_sha256=sha256_of_file(folder / "shard-1.idx"))
    manifest = replace(sets[0].manifest, samples=2, tokens=2, shards=tuple(shards))
    (folder / MANIFEST).write_text(manifest.to_json())
    made = ShardSet(folder)
    assert [made.record(idx)["text"] for idx in range(len(made))] == ["a", "c"]
    (folder / MANIFEST).write_text(replace(manifest, samples=0, shards=()).to_json())
    with pytest.raises(DataError, match="has 0 samples"):
        ShardSet(folder)


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
    (folder / "shard-000002.idx").write_bytes(b"x" * 100)
    with pytest.raises(StorageError, match=r"shard-000002\.idx has 100 bytes, fewer than before"):
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

"""The cache of vectors is bounded, survives damage, and tells models, markers and texts apart."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arc_ds import ArcModel, Segment
from arc_ds.inference.vectors import model_digest
from arc_ds.serving.cache import VectorCache, vector_key
from tests.helpers.full_disk import limited_file_size


def vectors(value: float = 1.0, rows: int = 4) -> Tensor:
    return torch.full((rows, 8), float(value))  # 128 bytes


def key(n: int) -> str:
    return f"{n:064x}"


def test_memory_drops_the_least_recently_used() -> None:
    cache = VectorCache(300)
    cache.keep(key(1), vectors(1))
    cache.keep(key(2), vectors(2))
    assert cache.recall(key(1)) is not None
    cache.keep(key(3), vectors(3))
    assert cache.recall(key(2)) is None and cache.used_bytes == 256
    assert torch.equal(cache.recall(key(1)), vectors(1)) and torch.equal(cache.recall(key(3)), vectors(3))
    cache.keep(key(4), vectors(rows=100))
    assert cache.recall(key(4)) is None and cache.used_bytes == 256, "an entry beyond the whole memory displaces none"


def test_the_disk_is_bounded_and_read_again_after_a_restart(tmp_path: Path) -> None:
    cache = VectorCache(1 << 20, tmp_path, 700)
    for n in range(5):
        cache.write(key(n), vectors(n))
    files = list(tmp_path.rglob("*.safetensors"))
    assert 2 <= len(files) < 5 and sum(file.stat().st_size for file in files) <= 700
    again = VectorCache(1 << 20, tmp_path, 700)
    assert again.recall(key(4)) is None and torch.equal(again.read(key(4), 8), vectors(4))
    assert torch.equal(again.recall(key(4)), vectors(4)), "vectors from the disk come into memory"
    assert again.read(key(0), 8) is None
    assert len(list(VectorCache(1, tmp_path, 300)._folder.rglob("*.safetensors"))) == 1, "a smaller limit is obeyed"


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "width", "gone"])
def test_a_damaged_file_counts_as_absent(tmp_path: Path, damage: str) -> None:
    VectorCache(0, tmp_path, 1 << 20).write(key(1), vectors())
    (file,) = tmp_path.rglob("*.safetensors")
    cache = VectorCache(0, tmp_path, 1 << 20)
    if damage == "gone":
        file.unlink()
    elif damage == "bit":
        raw = file.read_bytes()
        file.write_bytes(raw[:-3] + bytes([raw[-3] ^ 4]) + raw[-2:])
    elif damage != "width":
        file.write_bytes(file.read_bytes()[: 100 if damage == "cut" else 0])
    assert cache.read(key(1), 9 if damage == "width" else 8) is None
    assert not file.exists()
    cache.write(key(1), vectors())
    assert torch.equal(cache.read(key(1), 8), vectors())


def test_two_servers_share_one_folder_and_its_limit(tmp_path: Path) -> None:
    caches = [VectorCache(1 << 20, tmp_path, 2000) for _ in range(2)]
    caches[0].write(key(0), vectors(7))
    assert torch.equal(caches[1].read(key(0), 8), vectors(7)), "a file of the other server is read"
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    for n in range(1, 40):
        caches[n % 2].write(key(n), vectors(n))
        assert sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors")) <= 2000 + size
    for _ in range(2):
        caches[0].read(key(39), 8)
    assert caches[0]._file_bytes == sum(caches[0]._files.values()), "a file that is read twice counts once"


def test_the_least_recently_used_files_make_room(tmp_path: Path) -> None:
    cache = VectorCache(0, tmp_path, 1000)
    for n in range(4):
        cache.write(key(n), vectors(n))
        assert cache.read(key(0), 8) is not None
    assert cache.read(key(1), 8) is None


def test_a_folder_that_cannot_be_changed_serves_its_whole_files(tmp_path: Path, monkeypatch) -> None:
    cache = VectorCache(0, tmp_path, 1 << 20)
    for n in range(2):
        cache.write(key(n), vectors(n))
    cache._path(key(1)).write_bytes(b"")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.utime", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    again = VectorCache(0, tmp_path, 1)
    assert torch.equal(again.read(key(0), 8), vectors(0)) and again.read(key(1), 8) is None


def test_a_folder_that_is_removed_is_made_again(tmp_path: Path) -> None:
    cache = VectorCache(0, tmp_path / "cache", 1 << 20)
    cache.write(key(0), vectors(0))
    shutil.rmtree(tmp_path / "cache")
    assert cache.read(key(0), 8) is None
    cache.write(key(0), vectors(0))
    assert cache.read(key(0), 8) is not None


def test_a_full_disk_ends_writing_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = VectorCache(1 << 20, tmp_path, 1 << 20)
    with limited_file_size(64), caplog.at_level(logging.WARNING):
        for n in range(3):
            cache.write(key(n), vectors(n))
    assert [record.message[:40] for record in caplog.records] == ["vectors are no longer cached on the disk"]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_keys_tell_weights_ports_markers_and_texts_apart(model: ArcModel) -> None:
    digests = [model_digest(model)]
    parameter = next(model.compressor.parameters())
    former = parameter[0, 0].item()
    parameter.data[0, 0] = former + 1e-3
    digests.append(model_digest(model))
    parameter.data[0, 0] = former
    assert model_digest(model) == digests[0]
    contexts = [Segment.context(ids, marker) for ids in ([1, 2], [1, 3], [258]) for marker in ("cont", "rec", None)]
    keys = [vector_key(digest, decoder, context) for digest in digests for decoder in (0, 1) for context in contexts]
    assert len(set(keys)) == len(keys)

"""The cache of fetched shards: within its bound, each shard fetched once a host, and never silently wrong."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest

from arc_ds.errors import ConfigError, DataError, StorageError
from arc_ds.shards.reader import ShardSet
from arc_ds.shards.storage.cache import ShardCache, open_cache
from tests.helpers.faulty_server import FaultyServer
from tests.helpers.remote_shards import TEXTS, kept
from tests.helpers.waiting import LIMIT_S, wait_for


def test_the_bound_holds_and_the_least_recently_used_goes(
    local: ShardSet, server: FaultyServer, cache: ShardCache
) -> None:
    largest = max(shard.bytes for shard in local.manifest.shards)
    assert len(local.manifest.shards) > 5
    small = replace(cache, max_bytes=4 * largest)
    shards = ShardSet(server.url, cache=small)
    for idx in range(len(shards)):
        shards.record(idx)
        shards.record(0)  # stays in use
        assert sum(path.stat().st_size for path in kept(small)) <= small.max_bytes
    assert server.requests["shard-000000.tar"] == 1
    assert server.requests["shard-000001.tar"] == 1
    shards.record(int(shards.shard_sizes[0]))
    assert server.requests["shard-000001.tar"] == 2, "it had made room"


def test_what_is_mapped_stays_though_the_bound_is_passed(
    local: ShardSet, server: FaultyServer, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = sorted(shard.bytes for shard in local.manifest.shards)
    small = replace(cache, max_bytes=sizes[-1])
    files = ShardSet(server.url, cache=small).files
    with files.open(files.manifest.shards[0]) as first, files.open(files.manifest.shards[1]):
        assert len(kept(small)) == 2
        assert first.read() == (local.folder / "shard-000000.tar").read_bytes()
    assert "Raise data.cache_gib" in caplog.text
    files.open(files.manifest.shards[2]).close()
    assert len(kept(small)) == 1


def _read_all(url: str, cache: ShardCache, turn: int) -> None:
    shards = ShardSet(url, cache=cache)
    order = [(idx + turn * 17) % len(shards) for idx in range(len(shards))]
    assert all(shards.record(idx)["text"] == TEXTS[idx] for idx in order)


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_processes_that_share_a_cache_fetch_each_shard_once(
    local: ShardSet, server: FaultyServer, cache: ShardCache, share: float
) -> None:
    """If the cache is too small for all shards, the processes agree on evictions and still read the right records."""
    server.delay_s = 0.01
    total = sum(shard.bytes for shard in local.manifest.shards)
    cache = replace(cache, max_bytes=int(total * share))
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_read_all, args=(server.url, cache, turn)) for turn in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(LIMIT_S)
    assert [worker.exitcode for worker in workers] == [0] * 4
    tars = {name: count for name, count in server.requests.items() if name.endswith(".tar")}
    assert len(tars) == len(local.manifest.shards)
    if share == 1.0:
        assert set(tars.values()) == {1}


def test_a_killed_fetch_leaves_nothing_that_is_taken_for_whole(server: FaultyServer, cache: ShardCache) -> None:
    shards = ShardSet(server.url, cache=cache)
    server.faults = {".tar": ("stall", 1)}
    child = multiprocessing.get_context("fork").Process(target=shards.record, args=(0,))
    child.start()
    wait_for(lambda: server.faults[".tar"] == ("stall", 0))
    child.kill()
    child.join()
    assert [path.suffix for path in kept(cache)] == [".partial"]
    assert shards.record(0)["text"] == TEXTS[0]
    assert [path.suffix for path in kept(cache)] == [""]


def test_a_cached_tar_of_the_wrong_size_is_fetched_again(server: FaultyServer, cache: ShardCache) -> None:
    ShardSet(server.url, cache=cache).record(0)
    kept(cache)[0].write_bytes(b"x")
    assert ShardSet(server.url, cache=cache).record(0)["text"] == TEXTS[0]


def test_a_flipped_byte_in_the_cache_is_found_and_the_cure_is_named(server: FaultyServer, cache: ShardCache) -> None:
    ShardSet(server.url, cache=cache).record(0)
    path = kept(cache)[0]
    raw = bytearray(path.read_bytes())
    raw[530] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=rf"member 000000000\.json .*Delete {path}"):
        ShardSet(server.url, cache=cache).record(0)
    path.unlink()
    assert ShardSet(server.url, cache=cache).record(0)["text"] == TEXTS[0]


def test_a_full_disk_is_an_error_with_the_cure(
    server: FaultyServer, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ShardSet(server.url, cache=cache)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"cannot be kept in the cache .*No space left.*lower data\.cache_gib"):
            shards.record(0)
    assert kept(cache) == []
    assert shards.record(0)["text"] == TEXTS[0]


def test_a_cache_that_cannot_be_made_is_an_error(server: FaultyServer, cache: ShardCache, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/cache: Not a directory.*Set data\.cache_dir"):
        ShardSet(server.url, cache=replace(cache, folder=tmp_path / "file" / "cache"))


def test_a_cache_smaller_than_a_shard_is_refused_at_once(server: FaultyServer, cache: ShardCache) -> None:
    with pytest.raises(ConfigError, match=r"data\.cache_gib: .* may take 1000 bytes, but shard-000000\.tar of http"):
        ShardSet(server.url, cache=replace(cache, max_bytes=1000))


def test_defaults_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARC_DS_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    first = open_cache()
    assert first.folder == tmp_path / "xdg" / "arc-ds" / "shards"
    assert not first.folder.exists(), "nothing is made before it is needed"
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    assert first.max_bytes == pytest.approx(free / 2, rel=0.05)
    monkeypatch.setenv("ARC_DS_CACHE_DIR", str(tmp_path / "mine"))
    assert open_cache(cache_gib=2.5) == ShardCache(folder=tmp_path / "mine", max_bytes=5 << 29)
    assert open_cache(tmp_path / "given", 1).folder == tmp_path / "given"

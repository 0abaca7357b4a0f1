"""Remote shards give the same records as local ones."""

from __future__ import annotations

import logging
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from arc_ds.cli import main
from arc_ds.data.loading.source import Source
from arc_ds.data.loading.workers import BatchLoader
from arc_ds.errors import DataError
from arc_ds.shards.check import check_shards
from arc_ds.shards.reader import ShardSet
from arc_ds.shards.storage.cache import ShardCache
from arc_ds.shards.token_cache.writer import build_token_caches
from tests.helpers.batches import sequences
from tests.helpers.faulty_server import FaultyServer, serve
from tests.helpers.remote_shards import QUICK, TEXTS, kept, texts_of
from tests.helpers.tiny_mixture import WEIGHTS, TinyMixture
from tests.helpers.waiting import wait_for


def test_shards_behind_a_url_are_the_local_ones(local: ShardSet, server: FaultyServer, cache: ShardCache) -> None:
    shards = ShardSet(server.url, cache=cache)
    assert shards.fingerprint == local.fingerprint
    assert not any(name.endswith(".tar") for name in server.requests), "tars are fetched on demand"
    assert texts_of(shards) == TEXTS
    assert shards.num_tokens.tolist() == local.num_tokens.tolist()
    again = ShardSet(server.url + "/", cache=cache)
    assert texts_of(again) == TEXTS
    assert {count for name, count in server.requests.items() if name != "manifest.json"} == {1}
    assert list(check_shards(server.url, cache=cache)) == []
    kept(cache)[0].unlink()
    server.faults = {".tar": ("404", 9)}
    (fault,) = check_shards(server.url, cache=cache)
    assert "no such file" in fault.what, "a tar that cannot be fetched is a fault like others"


def test_a_check_of_a_url_says_which_copies_it_has_read(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARC_DS_CACHE_DIR", str(tmp_path / "kept"))
    assert main(["shards", "check", server.url, "--workers", "1"]) == 0
    assert f"all records whole (as kept in the cache {tmp_path / 'kept'})" in capsys.readouterr().out


def test_file_urls_are_local_paths(local: ShardSet) -> None:
    shards = ShardSet(local.folder.as_uri())
    assert shards.folder == local.folder
    assert texts_of(shards) == TEXTS


def test_a_folder_behind_a_url_may_have_any_name(local: ShardSet, cache: ShardCache, tmp_path: Path) -> None:
    (tmp_path / "my dätä #1").symlink_to(local.folder)
    with serve(tmp_path) as server:
        assert texts_of(ShardSet(f"{server.url}/my dätä #1", cache=cache)) == TEXTS


def test_prefetched_shards_are_there_when_they_are_wanted(server: FaultyServer, cache: ShardCache) -> None:
    shards = ShardSet(server.url, cache=cache)
    shards.prefetch([3, 1])
    wait_for(lambda: [path.suffix for path in (cache.folder / "tars").glob("*")] == ["", ""])
    asked = [name for name in server.requests if name.endswith(".tar")]
    assert asked == ["shard-000003.tar", "shard-000001.tar"]
    shards.record(int(shards.shard_sizes[:3].sum()))
    assert server.requests["shard-000003.tar"] == 1


def test_a_failed_prefetch_is_a_warning_and_the_reader_tries_again(
    server: FaultyServer, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    shards = ShardSet(server.url, cache=cache)
    server.faults = {".tar": ("404", 1)}
    shards.prefetch([0])
    wait_for(lambda: "not fetched ahead" in caplog.text)
    assert shards.record(0)["text"] == TEXTS[0]


def test_a_set_crosses_to_a_spawned_worker(server: FaultyServer, cache: ShardCache) -> None:
    shards = ShardSet(server.url, cache=cache)
    shards.record(0)
    shards.prefetch([1])
    copy = pickle.loads(pickle.dumps(shards))
    assert texts_of(copy) == TEXTS


def test_prefetch_of_local_shards_does_nothing(local: ShardSet, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    local.prefetch([0, 1])
    assert not caplog.records


@pytest.mark.parametrize("location", ["pipe:rm -rf /", "/etc/passwd", "../other.tar"])
def test_a_fetched_manifest_names_no_command_and_no_local_file(
    local: ShardSet, tmp_path: Path, cache: ShardCache, location: str
) -> None:
    shards = (replace(local.manifest.shards[0], location=location), *local.manifest.shards[1:])
    (tmp_path / "manifest.json").write_text(replace(local.manifest, shards=shards).to_json())
    for shard in shards:
        (tmp_path / shard.index_name).symlink_to(local.folder / shard.index_name)
    with pytest.raises(DataError, match="are not followed"):
        ShardSet(f"pipe:cat {tmp_path}", cache=cache)


class RemoteMixture(TinyMixture):
    """The sources of a mixture, served by a server."""

    url: str
    cache: ShardCache

    def sources(self, weights: tuple[float, ...] = WEIGHTS) -> list[Source]:
        return [
            replace(source, shards=ShardSet(f"{self.url}/{source.shards.folder.name}", cache=self.cache))
            for source in super().sources(weights)
        ]


@pytest.mark.parametrize("has_token_caches", [False, True])
def test_batches_of_remote_sources_are_the_local_ones(
    tmp_path: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch, has_token_caches: bool
) -> None:
    """Over workers that share a cache too small for all shards, and a server that fails now and then."""
    (tmp_path / "data").mkdir()
    mixture = TinyMixture.write(tmp_path / "data")
    expected = sequences(mixture.data()[step] for step in range(8))
    for name in ("texts", "questions", "long") if has_token_caches else ():
        build_token_caches(tmp_path / "data" / name, [mixture.encoder, mixture.decoder])
    remote = RemoteMixture(tmp_path / "data")
    with serve(tmp_path / "data") as server:
        remote.url = server.url
        remote.cache = replace(cache, max_bytes=30_000, retries=replace(QUICK, attempts=6))
        data = remote.data()
        server.faults = {"0.tar": ("cut", 2), "1.tar": ("500", 3), "2.tar": ("flip", 2)}
        if has_token_caches:
            server.faults |= {"0.ids": ("cut", 2), "1.texts": ("500", 3)}
        with BatchLoader(data, range(8), num_workers=2) as batches:
            assert sequences(batches) == expected
    assert sum(path.stat().st_size for path in mixture.folder.glob("*/*.tar")) > 30_000
    assert sum(left for _, left in server.faults.values()) == 0, "the faults happened"

"""Remote token caches are fetched like the tars. A warning names those that are not used."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from arc_ds.cli import main
from arc_ds.shards.reader import ShardSet
from arc_ds.shards.storage.cache import ShardCache
from arc_ds.shards.token_cache.cache import open_token_cache
from arc_ds.shards.token_cache.files import cache_name
from arc_ds.shards.token_cache.writer import build_token_caches
from arc_ds.tokenizers import Tokenizer, load_tokenizer
from tests.helpers.faulty_server import FaultyServer, serve
from tests.helpers.remote_shards import TEXTS, kept
from tests.helpers.tiny_data import write_json_tokenizer, write_shards, write_tiktoken
from tests.helpers.waiting import wait_for


@pytest.fixture
def tokenizer(local: ShardSet) -> Iterator[Tokenizer]:
    """A tokenizer whose token cache is next to the local shards."""
    path = local.folder.parent / "t.model"
    (made,) = build_token_caches(local.folder, [path])
    yield load_tokenizer(path)
    shutil.rmtree(made.folder)


def known_texts(shards: ShardSet, tokenizer: Tokenizer) -> list[str]:
    """The texts that the token cache knows, of all records, once it is verified that it knows them right."""
    cache = open_token_cache(shards, tokenizer)
    assert cache is not None
    known = [text for idx in range(len(shards)) for text in cache.known(idx, shards.record(idx))]
    assert all(each.encoding.ids.tolist() == tokenizer.encode(each.text) for each in known)
    return [each.text for each in known]


def test_the_token_cache_behind_a_url_is_fetched_when_needed_and_once(
    server: FaultyServer, cache: ShardCache, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    shards = ShardSet(server.url, cache=cache)
    opened = open_token_cache(shards, tokenizer)
    assert opened is not None
    assert not any(name.endswith((".ids", ".texts")) for name in server.requests), "files are fetched on demand"
    server.faults = {"000001.ids": ("flip", 1), "000002.texts": ("cut", 2), "cache.json": ("500", 1)}
    assert known_texts(shards, tokenizer) == TEXTS
    assert len([record for record in caplog.records if "failed" in record.getMessage()]) == 4
    assert known_texts(ShardSet(server.url, cache=cache), tokenizer) == TEXTS
    assert server.requests["shard-000000.ids"] == server.requests["shard-000000.texts"] == 1


def test_the_token_cache_of_a_command_s_shards_is_fetched(
    local: ShardSet, cache: ShardCache, tokenizer: Tokenizer
) -> None:
    assert known_texts(ShardSet(f"pipe:cat {local.folder}/{{}} | cat", cache=cache), tokenizer) == TEXTS


def test_where_a_url_has_no_token_cache_one_line_says_so_and_it_is_asked_once(
    local: ShardSet, server: FaultyServer, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tokenizer = load_tokenizer(local.folder.parent / "t.model")
    for url in (server.url, f"pipe:cat {local.folder}", f"pipe:cat {local.folder}/{{}} | cat"):
        shards = ShardSet(url, cache=cache)
        caplog.clear()
        assert open_token_cache(shards, tokenizer) is None
        (record,) = caplog.records
        assert record.levelno == logging.INFO
        assert f"no token cache found (tokens-{tokenizer.fingerprint[:16]}/cache.json)" in record.getMessage()
    assert server.requests["cache.json"] == 1


@pytest.mark.parametrize(
    ("end", "kind", "message"), [("cache.json", "500", "tried 3 times"), (".ids", "404", "no such file")]
)
def test_a_token_cache_that_cannot_be_fetched_is_named_and_left_unused(
    server: FaultyServer,
    cache: ShardCache,
    tokenizer: Tokenizer,
    caplog: pytest.LogCaptureFixture,
    end: str,
    kind: str,
    message: str,
) -> None:
    server.faults = {end: (kind, 99)}  # type: ignore[dict-item]
    shards = ShardSet(server.url, cache=cache)
    opened = open_token_cache(shards, tokenizer)
    assert opened is None or all(opened.known(idx, shards.record(idx)) == [] for idx in range(len(shards)))
    told = [record.getMessage() for record in caplog.records if "on the fly" in record.getMessage()]
    assert len(told) == 1 and message in told[0]
    assert "Check the address" in told[0] and "shards tokenize" not in told[0], "that would not help"
    requests = {name: count for name, count in server.requests.items() if name.endswith(".ids")}
    assert set(requests.values()) <= {1}, "each is tried once"


def test_a_token_cache_of_other_shards_or_with_damaged_sums_is_left_unused(
    server: FaultyServer, cache: ShardCache, local: ShardSet, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    index = local.folder / cache_name(tokenizer.fingerprint) / "cache.json"
    spec = json.loads(index.read_text())
    spec["shards"]["shard-000001.tar"]["origin"] = "0" * 64
    index.write_text(json.dumps(spec))
    assert open_token_cache(ShardSet(server.url, cache=cache), tokenizer) is None
    assert "stale" in caplog.text and caplog.text.rstrip().endswith("Run arc-ds shards tokenize again.")
    spec["shards"]["shard-000001.tar"]["ids_sha256"] = "../../x"
    index.write_text(json.dumps(spec))
    assert open_token_cache(ShardSet(server.url, cache=cache), tokenizer) is None
    assert "expected sha256 digests" in caplog.text


def test_a_token_cache_with_a_file_larger_than_the_bound_is_left_unused(
    local: ShardSet, cache: ShardCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = local.folder.parent / "t.model"
    long = write_shards(tmp_path / "long", path, ["xyz" * 4000], max_tokens=20_000)  # a token a character
    build_token_caches(long.folder, [path])
    shards = ShardSet(f"pipe:cat {long.folder}", cache=replace(cache, max_bytes=long.manifest.shards[0].bytes))
    assert open_token_cache(shards, load_tokenizer(path)) is None
    assert caplog.text.rstrip().endswith("one of its files has 60000 bytes, more than data.cache_gib allows. Raise it.")


def test_a_token_cache_counts_towards_the_bound(
    tmp_path: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapped files cannot be evicted, for any number of sources and tokenizers."""
    paths = [write_tiktoken(tmp_path / "t.model"), write_json_tokenizer(tmp_path / "json")]
    texts = [[f"{text} Of the {name}." for text in TEXTS] for name in ("lamp", "lake")]
    local = [write_shards(tmp_path / str(nth), paths[0], each, shard_bytes=1 << 12) for nth, each in enumerate(texts)]
    for shards in local:
        build_token_caches(shards.folder, paths)
    sizes = [path.stat().st_size for path in tmp_path.rglob("shard-*") if path.suffix != ".idx"]
    small = replace(cache, max_bytes=sum(sizes) // 3)
    with serve(tmp_path) as server:
        remote = [ShardSet(f"{server.url}/{shards.folder.name}", cache=small) for shards in local]
        opened = [[open_token_cache(shards, load_tokenizer(path)) for path in paths] for shards in remote]
        for idx in range(len(TEXTS)):
            for shards, caches, expected in zip(remote, opened, texts, strict=True):
                record = shards.record(idx)
                assert record["text"] == expected[idx]
                assert all(each is not None and len(each.known(idx, record)) == 1 for each in caches)
                assert sum(path.stat().st_size for path in kept(small)) <= small.max_bytes


def test_a_damaged_token_file_in_the_cache_is_found_and_the_cure_is_named(
    server: FaultyServer, cache: ShardCache, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    shards = ShardSet(server.url, cache=cache)
    known_texts(shards, tokenizer)
    (ids, _) = shards.files.beside[cache_name(tokenizer.fingerprint)]["shard-000000.tar"]
    path = cache.path(ids)
    path.write_bytes(b"x" * ids.num_bytes)
    opened = open_token_cache(shards, tokenizer)
    assert opened is not None and opened.known(0, shards.record(0)) == []
    assert f"Delete {path}" in caplog.text
    path.unlink()
    assert known_texts(shards, tokenizer) == TEXTS


def test_tokenize_of_a_url_writes_where_training_looks(
    server: FaultyServer, cache: ShardCache, local: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARC_DS_CACHE_DIR", str(cache.folder))
    path = local.folder.parent / "t.model"
    assert main(["shards", "tokenize", server.url, "--tokenizer", str(path), "--workers", "2"]) == 0
    assert known_texts(ShardSet(server.url, cache=cache), load_tokenizer(path)) == TEXTS
    assert not any(name.endswith((".json", ".ids")) for name in server.requests if name != "manifest.json")


def test_a_token_cache_is_fetched_ahead_with_its_tars(
    server: FaultyServer, cache: ShardCache, tokenizer: Tokenizer
) -> None:
    shards = ShardSet(server.url, cache=cache)
    assert open_token_cache(shards, tokenizer) is not None
    shards.prefetch([2])
    wanted = {"shard-000002.tar", "shard-000002.ids", "shard-000002.texts"}
    wait_for(lambda: wanted <= server.requests.keys() and not any(path.suffix for path in kept(cache)))
    assert len(kept(cache)) == 3

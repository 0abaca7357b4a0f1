"""Fixtures of this folder: shards on a server that misbehaves on request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from arc_ds.shards.reader import ShardSet
from arc_ds.shards.storage.cache import ShardCache
from tests.helpers.faulty_server import FaultyServer, serve
from tests.helpers.remote_shards import QUICK, TEXTS
from tests.helpers.tiny_data import write_shards, write_tiktoken


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiktoken(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("data")
    return write_shards(folder / "shards", write_tiktoken(folder / "t.model"), TEXTS)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server(local: ShardSet) -> Iterator[FaultyServer]:
    with serve(local.folder) as state:
        yield state


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(folder=tmp_path / "cache", max_bytes=1 << 20, retries=QUICK)

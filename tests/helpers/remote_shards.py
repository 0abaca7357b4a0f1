"""Texts, retries and readers for the tests of remote shards."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from arc_ds.shards.reader import ShardSet
from arc_ds.shards.storage.cache import ShardCache
from arc_ds.shards.storage.remote import Retries
from tests.helpers.tiny_data import numbered_texts

TEXTS = numbered_texts(60)
QUICK = Retries(attempts=3, first_wait_s=0.01, timeout_s=0.5)


def texts_of(shards: ShardSet) -> list[str]:
    return [shards.record(idx)["text"] for idx in range(len(shards))]


def kept(cache: ShardCache) -> list[Path]:
    return sorted((cache.folder / "tars").iterdir())


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)

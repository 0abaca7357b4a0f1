"""Texts, retries and readers for the tests of remote shards."""

from __future__ import annotations

from pathlib import Path

from arc_ds.shards.reader import ShardSet
from arc_ds.shards.storage.cache import ShardCache
from arc_ds.shards.storage.remote import Retries
from tests.helpers.tiny_data import numbered_texts
from tests.helpers.waiting import LIMIT_S

TEXTS = numbered_texts(60)
QUICK = Retries(attempts=3, first_wait_s=0.01, timeout_s=LIMIT_S)


def texts_of(shards: ShardSet) -> list[str]:
    return [shards.record(idx)["text"] for idx in range(len(shards))]


def kept(cache: ShardCache) -> list[Path]:
    return sorted((cache.folder / "tars").iterdir())

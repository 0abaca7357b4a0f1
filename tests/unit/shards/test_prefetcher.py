"""The prefetch thread: an error never stops it from fetching later shards."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from arc_ds.shards.prefetcher import Prefetcher
from tests.helpers.waiting import wait_for


class _Files:
    """Three shards; fetching the first raises an unexpected error."""

    def __init__(self) -> None:
        self.manifest = SimpleNamespace(shards=[SimpleNamespace(bytes=1, number=number) for number in range(3)])
        self.brought: list[int] = []

    def num_bytes(self, shard: Any) -> int:
        return int(shard.bytes)

    def prefetch(self, shard: Any) -> None:
        if shard.number == 0:
            raise KeyError("unforeseen")
        self.brought.append(shard.number)


def _wait_for_threads() -> None:
    wait_for(lambda: all(thread.name != "shard-prefetch" for thread in threading.enumerate()))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_after_an_error_that_nobody_foresaw_the_next_shards_are_fetched_all_the_same() -> None:
    files = _Files()
    prefetcher = Prefetcher(files, 100)  # type: ignore[arg-type]
    prefetcher.want([0])
    _wait_for_threads()
    prefetcher.want([1, 2])
    _wait_for_threads()
    assert files.brought == [1, 2]


def test_a_thread_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    files = _Files()
    prefetcher = Prefetcher(files, 100)  # type: ignore[arg-type]
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="new thread"):
        patch.setattr(threading.Thread, "start", _cannot_start)
        prefetcher.want([1])
    prefetcher.want([2])
    _wait_for_threads()
    assert files.brought == [2]


def _cannot_start(_thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")

"""Mapped files: a process stays within its bounds and closes the least recently used files first."""

from __future__ import annotations

import gc
import hashlib
import logging
import mmap
import multiprocessing
import os
import random
import resource
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arc_ds.errors import StorageError
from arc_ds.shards import mappings
from arc_ds.shards.mappings import MappedFiles, close_all, descriptor_shortage, raise_descriptor_limit
from arc_ds.shards.reader import ShardSet
from arc_ds.shards.storage.cache import ShardCache
from arc_ds.shards.token_cache.cache import TokenCache, open_token_cache
from arc_ds.shards.token_cache.writer import build_token_caches
from arc_ds.tokenizers import load_tokenizer
from tests.helpers.tiny_data import numbered_texts, write_shards, write_tiktoken

TEXTS = numbered_texts(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with a token cache."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer = write_tiktoken(folder / "tokenizer.model")
    shards = write_shards(folder / "shards", tokenizer, TEXTS, shard_bytes=1 << 11)
    assert len(shards.manifest.shards) > 10
    build_token_caches(shards.folder, [tokenizer])
    return folder


@pytest.fixture
def lower_limit() -> Iterator[Callable[[int], None]]:
    """A function that sets the limit on open files of this process."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def lower(limit: int) -> None:
        close_all()
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))

    yield lower
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
    close_all()


def num_open() -> int:
    return len(os.listdir("/dev/fd"))


def open_source(folder: Path) -> tuple[ShardSet, TokenCache]:
    shards = ShardSet(folder / "shards")
    cache = open_token_cache(shards, load_tokenizer(folder / "tokenizer.model"))
    assert cache is not None
    return shards, cache


def assert_reads(shards: ShardSet, cache: TokenCache, idx: int) -> None:
    record = shards.record(idx)
    assert record["text"] == TEXTS[idx]
    assert [known.text for known in cache.known(idx, record)] == [TEXTS[idx]]


def test_many_sources_stay_within_the_descriptors_of_a_process(
    folder: Path, lower_limit: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    sources = [open_source(folder) for _ in range(6)]
    num_files = sum(4 * len(shards.manifest.shards) for shards, _ in sources)
    gc.collect()
    before = num_open()
    lower_limit(2 * before + 40)
    assert num_files > 2 * before + 40, "the files must exceed the limit"
    for idx in [*range(60), *random.Random(0).sample(range(60), 60)]:
        for shards, cache in sources:
            assert_reads(shards, cache, idx)
            assert num_open() <= before + before + 20
    assert not caplog.records


class Mapped:
    """Stand-in for a mapping."""

    def __init__(self, idx: int) -> None:
        self.idx = idx


def cache_of(max_mapped: int) -> ShardCache:
    """A cache that allows this many bytes to be mapped."""
    return ShardCache(folder=Path("/nowhere"), max_bytes=4 * max_mapped)


@given(
    wanted=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), max_size=80),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    most=st.integers(1, 12),
)
def test_sets_of_one_cache_hold_no_more_than_a_quarter_of_it_or_one_each(
    wanted: list[tuple[int, int]], sizes: tuple[int, int, int], most: int
) -> None:
    alive: tuple[weakref.WeakSet[Mapped], ...] = (weakref.WeakSet(), weakref.WeakSet(), weakref.WeakSet())

    def mapped_bytes() -> int:
        return sum(len(of_set) * size for of_set, size in zip(alive, sizes, strict=True))

    def open_one(set_idx: int, idx: int) -> Mapped:
        assert mapped_bytes() + sizes[set_idx] <= max(most, sum(sizes)), "room must be made before a file is opened"
        mapped = Mapped(idx)
        alive[set_idx].add(mapped)
        return mapped

    cache = cache_of(most)
    held = [MappedFiles(num_bytes=size, cache=cache) for size in sizes]
    for set_idx, idx in wanted:
        others = [len(of_set) > 0 for of_set in alive]
        mapped = held[set_idx].get(idx, partial(open_one, set_idx))
        assert mapped.idx == idx
        assert held[set_idx].get(idx, pytest.fail) is mapped
        del mapped
        assert all(had <= (len(of_set) > 0) for had, of_set in zip(others, alive, strict=True)), "the others keep one"


def test_the_least_recently_used_file_is_closed_first() -> None:
    """Like the files of two shuffle windows while the next ones arrive: 128 of 512 open files are in use."""
    opened: Counter[int] = Counter()

    def open_one(idx: int) -> object:
        opened[idx] += 1
        return object()

    held, rng = MappedFiles(num_bytes=1, cache=cache_of(512)), random.Random(0)
    for idx in range(128, 1128):
        held.get(idx, open_one)
        for _ in range(20):
            held.get(rng.randrange(128), open_one)
    assert set(opened.values()) == {1}, "files in use stay mapped"
    held.get(1127 - (512 - 128) + 1, open_one)
    held.get(1127 - (512 - 128), open_one)
    assert opened[1127 - (512 - 128) + 1] == 1 and opened[1127 - (512 - 128)] == 2


def test_threads_read_what_others_close(folder: Path, lower_limit: Callable[[int], None]) -> None:
    sources = [open_source(folder) for _ in range(3)]
    lower_limit(2 * num_open() + 20)

    def read(seed: int) -> None:
        for idx in random.Random(seed).choices(range(60), k=150):
            for shards, cache in sources:
                assert_reads(shards, cache, idx)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))


def test_a_set_that_is_gone_holds_nothing(folder: Path) -> None:
    before = num_open()
    shards, cache = open_source(folder)
    assert_reads(shards, cache, 0)
    assert num_open() == before + 4
    gc.disable()  # which would close them later
    try:
        del cache
        assert num_open() == before + 2
        del shards
        assert num_open() == before
    finally:
        gc.enable()


def test_what_is_let_go_stays_readable_by_who_holds_it(folder: Path) -> None:
    shards = ShardSet(folder / "shards")
    tar, rows = shards._tars.get(0, shards._map_tar), shards._indexes.get(0, shards._index_rows)
    whole = bytes(tar), bytes(rows)
    close_all()
    assert (bytes(tar), bytes(rows)) == whole
    assert shards._tars.get(0, shards._map_tar) is not tar


@contextmanager
def no_descriptor_left(spare: int = 0) -> Iterator[None]:
    """Occupy all descriptors except `spare`, and release them afterwards."""
    taken = []
    try:
        while True:
            taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        for _ in range(spare):
            os.close(taken.pop())
    try:
        yield
    finally:
        for each in taken:
            os.close(each)


def test_too_many_open_files_is_an_error_of_its_own_and_no_damage(
    folder: Path, lower_limit: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    shards, cache = open_source(folder)
    tokenizer, record = load_tokenizer(folder / "tokenizer.model"), shards.record(0)
    limit = num_open() + 50
    lower_limit(limit)
    with no_descriptor_left():
        with pytest.raises(StorageError, match=rf"0\.idx cannot be opened: .* {limit} open files.*ulimit -n 4096;"):
            shards.record(0)
        with pytest.raises(StorageError, match=r"shard-000000\.texts cannot be opened: .*ulimit -n"):
            cache.known(0, record)
        with pytest.raises(StorageError, match=r"cache\.json cannot be opened: .*ulimit -n"):
            open_token_cache(shards, tokenizer)
    with no_descriptor_left(spare=1), pytest.raises(StorageError, match="cannot be opened: .*ulimit -n"):
        cache.known(0, record)  # no descriptor is left to map the open file
    assert not caplog.records
    assert_reads(shards, cache, 0)


def test_mappings_are_let_go_where_others_took_the_descriptors(
    folder: Path, lower_limit: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    mappings._warn_of_shortage.cache_clear()
    shards, cache = open_source(folder)
    lower_limit(num_open() + 60)
    for idx in range(20):
        assert_reads(shards, cache, idx)
    with no_descriptor_left():
        for idx in range(60):
            assert_reads(shards, cache, idx)
    (warning,) = caplog.records
    assert "ulimit -n" in warning.getMessage()
    assert warning.levelno == logging.WARNING


def test_other_errors_are_not_taken_for_it() -> None:
    assert descriptor_shortage(FileNotFoundError(2, "No such file")) is None
    assert descriptor_shortage(StorageError("Too many open files")) is None


def _read_all(shards: ShardSet, cache: TokenCache) -> None:
    for idx in range(60):
        assert_reads(shards, cache, idx)


def test_mappings_cross_a_fork(folder: Path) -> None:
    shards, cache = open_source(folder)
    assert_reads(shards, cache, 0)
    child = multiprocessing.get_context("fork").Process(target=_read_all, args=(shards, cache))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert_reads(shards, cache, 1)


def test_indexes_and_text_tables_are_not_copied_to_the_heap(folder: Path) -> None:
    """Otherwise each worker would hold its own copy."""
    shards, cache = open_source(folder)
    assert_reads(shards, cache, 0)
    rows = shards._indexes.get(0, pytest.fail)
    assert isinstance(rows.obj, mmap.mmap)
    _, texts = cache._shards.get(0, pytest.fail)
    assert not any(array.flags.owndata or array.flags.writeable for array in texts)


def test_a_table_of_texts_is_summed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verifying the checksum at every mapping would take longer than tokenising the text of a record."""
    shards, cache = open_source(folder)
    assert_reads(shards, cache, 0)
    close_all()
    monkeypatch.setattr(hashlib, "sha256", lambda *_: pytest.fail("summed again"))
    assert_reads(shards, cache, 0)


def test_the_soft_limit_is_raised_to_the_hard_one(lower_limit: Callable[[int], None]) -> None:
    lower_limit(200)
    raise_descriptor_limit()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft == min(hard, 65536) if hard != resource.RLIM_INFINITY else soft == 65536
    raise_descriptor_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)

"""Remote shards: those of the next shuffle window are fetched while the current one is read."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

from arc_ds.data.loading.decoder_reader import ReaderFiles
from arc_ds.data.loading.loader import StepData
from arc_ds.shards.reader import ShardSet
from arc_ds.shards.storage.cache import ShardCache
from tests.helpers.batches import digest
from tests.helpers.tiny_mixture import TinyMixture
from tests.helpers.waiting import wait_for


def remote_data(mixture: TinyMixture, cache: ShardCache) -> StepData:
    """The mixture's data with a remote first source."""
    local = mixture.data()
    first = replace(local.sources[0], shards=ShardSet(f"pipe:cat {mixture.folder}/texts", cache=cache))
    sources = [first, *local.sources[1:]]
    order = replace(local.order, sources=tuple(source.shape for source in sources))
    readers = [ReaderFiles(tokenizer=mixture.decoder), ReaderFiles(tokenizer=mixture.encoder)]
    return StepData(
        order=order, sources=sources, encoder_tokenizer=mixture.encoder, readers=readers, pooling=local.pooling
    )


def fetched(cache: ShardCache) -> set[str]:
    """Checksums of the complete tars in the cache."""
    return {path.name for path in (cache.folder / "tars").glob("*") if not path.name.endswith(".partial")}


def sums(data: StepData, shard_idxs: tuple[int, ...]) -> set[str]:
    return {data.sources[0].shards.manifest.shards[idx].sha256 for idx in shard_idxs}


def test_the_next_windows_shards_come_while_this_one_is_read(mixture: TinyMixture, tmp_path: Path) -> None:
    cache = ShardCache(folder=tmp_path, max_bytes=1 << 30)
    data = remote_data(mixture, cache)
    assert digest(data[0]) == digest(mixture.data()[0]), "where shards lie is no part of the order"
    current, following = data.order.windows(0)[0]
    assert not set(current) & set(following)
    wait_for(lambda: sums(data, following) <= fetched(cache), "the next window's shards did not come")
    assert len(fetched(cache)) < len(data.sources[0].shards.manifest.shards), "nor does everything come at once"


def test_a_cache_too_small_for_two_windows_is_not_filled_ahead(mixture: TinyMixture, tmp_path: Path) -> None:
    data = remote_data(mixture, ShardCache(folder=tmp_path, max_bytes=1 << 30))
    largest = max(shard.bytes for shard in data.sources[0].shards.manifest.shards)
    cache = ShardCache(folder=tmp_path / "small", max_bytes=3 * largest)
    data = remote_data(mixture, cache)
    asked: list[list[int]] = []
    data.sources[0].shards.prefetch = lambda shard_idxs: asked.append(list(shard_idxs))  # type: ignore[method-assign]
    data[0]
    assert asked == [list(data.order.windows(0)[0][0])]


def test_windows_follow_each_other_into_the_next_epoch(mixture: TinyMixture) -> None:
    order = mixture.data(batch_size=2).order
    seen = [found[0] for step in range(120) if 0 in (found := order.windows(step))]
    steps = list(itertools.pairwise(seen))
    assert all(after[0] in before for before, after in steps), "what is read next was asked for, or is being read"
    assert sum(before[0] != after[0] for before, after in steps) > 8

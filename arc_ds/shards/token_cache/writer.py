"""Writes token caches shard by shard (`arc-ds shards tokenize`).

Shape letters: N tokens of a text.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray
from tqdm import tqdm

from arc_ds.errors import DataError
from arc_ds.shards.format import Manifest, ShardInfo, sha256_of_file
from arc_ds.shards.parallel import Engine, map_in_order, on_shared_folder
from arc_ds.shards.reader import ShardSet
from arc_ds.shards.token_cache.files import (
    CACHE_FILE,
    MAX_CHARACTERS,
    TOKEN_BYTES,
    CachedShard,
    CacheIndex,
    ShardTexts,
    cache_name,
    dump_texts,
    find_fault,
    ids_name,
    origin_of,
    read_cache_index,
    texts_name,
    texts_of,
)
from arc_ds.system.files import output, whole_file, write_whole
from arc_ds.system.locks import LOCK_FILE, writing
from arc_ds.tokenizers import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSummary:
    """Summary of one cache.

    folder: its folder.
    records: number of records.
    ids: number of ids of all texts.
    left_out: see `CachedShard`.
    made: number of shards that this call tokenised; the others existed already.
    """

    folder: Path
    records: int
    ids: int
    left_out: int
    made: int


def build_token_caches(
    path: str | Path,
    tokenizers: Sequence[str | Path],
    *,
    workers: int = 1,
    engine: Engine = map_in_order,
    progress: bool = False,
) -> tuple[CacheSummary, ...]:
    """Write the caches of a set of shards for some tokenizers, and return their summaries.

    Shards that a cache already contains are not tokenised again unless they have changed, so a killed call resumes.
    All files are written atomically.

    path: folder of the shards, or a URL. For a URL the caches are kept on this host, and training runs on this host
        find them.
    tokenizers: files or folders of tokenizers.
    workers: number of worker processes.
    engine: runs these processes, on this host or on many (`arc_ds.shards.ray_engine`). Other hosts read the shards and
        the tokenizers, and write the caches, under the same paths.
    progress: show a progress bar.

    Raises DataError if the shards cannot be read, a worker dies or another call is writing the same cache, and
    StorageError if the caches cannot be written.
    """
    shards = ShardSet(path)
    folders = [shards.folder / cache_name(load_tokenizer(tokenizer).fingerprint) for tokenizer in tokenizers]
    cure = (
        "A token cache is stored next to the manifest. If that folder is not writable, make another manifest for the "
        "same tars (arc-ds shards index FOLDER --out OTHER), tokenize OTHER and use it as the source of a new run."
    )
    summaries = []
    for tokenizer, folder in zip(tokenizers, folders, strict=True):
        with output(folder, cure, lambda: "Finished shards are kept."), writing(folder, "tokenize"):
            summaries.append(_fill_cache(shards, Path(tokenizer), folder, workers, engine, progress))
    return tuple(summaries)


def _fill_cache(
    shards: ShardSet, tokenizer: Path, folder: Path, workers: int, engine: Engine, progress: bool
) -> CacheSummary:
    """Tokenise the shards that a locked cache lacks. Rewrites the index of the cache after each shard."""
    fingerprint, infos = load_tokenizer(tokenizer).fingerprint, shards.manifest.shards
    done = _finished(shards.manifest, folder, fingerprint)
    for stray in stray_files(folder, done):
        stray.unlink()
    missing = [idx for idx, info in enumerate(infos) if info.name not in done]
    tokenize = on_shared_folder(folder, partial(_tokenize_shard, shards, tokenizer, folder))
    made = engine(tokenize, missing, workers)
    with closing(made), tqdm(total=len(shards), unit="record", disable=not progress) as bar:
        bar.update(sum(cached.records for cached in done.values()))
        _write_index(folder, fingerprint, done)
        for shard_idx, cached in made:
            done[infos[shard_idx].name] = cached
            _write_index(folder, fingerprint, done)
            bar.update(cached.records)
    left_out = sum(cached.left_out for cached in done.values())
    if left_out:
        logger.warning(
            "%s: %d records or texts are not in this cache and will be tokenised on the fly", folder, left_out
        )
    return CacheSummary(
        folder=folder,
        records=sum(cached.records for cached in done.values()),
        ids=sum(cached.ids for cached in done.values()),
        left_out=left_out,
        made=len(missing),
    )


def _write_index(folder: Path, fingerprint: str, done: Mapping[str, CachedShard]) -> None:
    write_whole(folder / CACHE_FILE, CacheIndex(fingerprint=fingerprint, shards=done).to_json())


def _finished(manifest: Manifest, folder: Path, fingerprint: str) -> dict[str, CachedShard]:
    """The shards in a cache that are up to date and undamaged."""
    try:
        index = read_cache_index(folder)
    except DataError:
        return {}
    if index.fingerprint != fingerprint:
        return {}
    return {
        shard.name: index.shards[shard.name]
        for shard in manifest.shards
        if fault_of(folder, index, manifest, shard) is None
    }


def stray_files(folder: Path, done: Mapping[str, CachedShard]) -> list[Path]:
    """The files in a cache folder that belong to no finished shard."""
    known = {CACHE_FILE, LOCK_FILE, *map(ids_name, done), *map(texts_name, done)}
    return sorted(path for path in folder.glob("*") if path.name not in known)


def _tokenize_shard(shards: ShardSet, tokenizer: Path, folder: Path, shard_idx: int) -> CachedShard:
    """Write the `.ids` and `.texts` files of one shard. An unreadable record has no texts."""
    info = shards.manifest.shards[shard_idx]
    begin = int(shards.shard_sizes[:shard_idx].sum())
    encoder = load_tokenizer(tokenizer)
    first, checksums, lengths = [(0, 0)], [], []
    left_out, digest = 0, hashlib.sha256()
    with whole_file(folder / ids_name(info.name)) as file:
        for record_idx in range(begin, begin + info.samples):
            try:
                tokens = [_tokens_of(text, encoder) for text in texts_of(shards.record(record_idx))]
            except DataError:  # a training run that reads the record reports the fault
                tokens = []
                left_out += 1
            payload = b"".join(
                [ids.tobytes() for ids, _ in tokens] + [characters.tobytes() for _, characters in tokens]
            )
            file.write(payload)
            digest.update(payload)
            checksums.append(xxhash.xxh64_intdigest(payload))
            lengths += [len(ids) for ids, _ in tokens]
            left_out += sum(len(ids) == 0 for ids, _ in tokens)
            first.append((first[-1][0] + len(payload) // TOKEN_BYTES, len(lengths)))
    texts = dump_texts(
        ShardTexts(np.array(first, np.uint64), np.array(checksums, np.uint64), np.array(lengths, np.uint32))
    )
    write_whole(folder / texts_name(info.name), texts)
    return CachedShard(
        origin=origin_of(shards.manifest, info),
        records=info.samples,
        ids=first[-1][0],
        left_out=left_out,
        ids_sha256=digest.hexdigest(),
        texts_sha256=hashlib.sha256(texts).hexdigest(),
        texts_bytes=len(texts),
    )


def _tokens_of(text: str, tokenizer: Tokenizer) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """The ids of a text, [N], and the number of characters that end with each, [N].

    Both are empty if a token has more than `MAX_CHARACTERS` characters.
    """
    ids, ends = tokenizer.encode_with_ends(text)
    characters = np.diff(ends)
    if len(ids) and characters.max() > MAX_CHARACTERS:
        ids, characters = ids[:0], characters[:0]
    return ids.astype("<u4"), characters.astype(np.uint8)


def fault_of(cache: Path, index: CacheIndex, manifest: Manifest, shard: ShardInfo) -> str | None:
    """The fault of one shard in a local cache; None if there is none. Verifies the checksums of its files."""
    if (fault := find_fault(index, manifest, shard, cache)) is not None:
        return fault
    files = index.shards[shard.name].files(shard.name)
    try:
        damaged = [file.address for file in files if sha256_of_file(cache / file.address) != file.sha256]
    except OSError as error:  # another call may remove the cache meanwhile
        return f"{error.filename} cannot be read: {error.strerror}"
    return f"the sha256 of {damaged[0]} does not match" if damaged else None

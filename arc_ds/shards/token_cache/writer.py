"""Writes token caches shard by shard (`arc-ds shards tokenize`), and checks them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from tqdm import tqdm

from arc_ds.errors import DataError, StorageError
from arc_ds.shards.faults import Fault
from arc_ds.shards.format import Manifest, ShardInfo, sha256_of_file
from arc_ds.shards.locks import LOCK_FILE, writing
from arc_ds.shards.reader import ShardSet
from arc_ds.shards.storage.cache import is_disk_full
from arc_ds.shards.token_cache.files import (
    CACHE_FILE,
    MAX_CHARACTERS,
    PREFIX,
    CachedShard,
    CacheIndex,
    ShardTexts,
    cache_name,
    dump_texts,
    ids_name,
    is_of,
    origin_of,
    read_cache_index,
    texts_name,
    texts_of,
    wrong_size,
)
from arc_ds.system.files import whole_file, write_whole
from arc_ds.system.processes import worker_pool
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
    path: str | Path, tokenizers: Sequence[str | Path], *, workers: int = 1, progress: bool = False
) -> tuple[CacheSummary, ...]:
    """Write the caches of a set of shards for some tokenizers, and return their summaries.

    Shards that a cache already contains are not tokenised again unless they have changed, so a killed call resumes.
    All files are written atomically.

    path: folder of the shards, or a URL. For a URL the caches are kept on this host, and training runs on this host
        find them.
    tokenizers: files or folders of tokenizers.
    workers: number of worker processes.
    progress: show a progress bar.

    Raises DataError if the shards cannot be read, a worker dies or another call is writing the same cache, and
    StorageError if the caches cannot be written.
    """
    shards = ShardSet(path)
    loaded = [(str(tokenizer), load_tokenizer(tokenizer)) for tokenizer in tokenizers]
    jobs = [
        _CacheJob(str(path), shards, tokenizer, tokenizer_path, shards.folder / cache_name(tokenizer.fingerprint))
        for tokenizer_path, tokenizer in loaded
    ]
    return tuple(_build_or_say_why_not(job, workers, progress) for job in jobs)


def _build_or_say_why_not(job: _CacheJob, workers: int, progress: bool) -> CacheSummary:
    """Run `_build_cache` with the cache locked. Raises StorageError, with the remedy, if it cannot be written."""
    try:
        job.folder.mkdir(exist_ok=True)
        with writing(job.folder, "tokenize"):
            return _build_cache(job, workers, progress)
    except OSError as error:
        cure = (
            "Free some disk space; the same command resumes after the finished shards."
            if is_disk_full(error)
            else "A token cache is stored next to the manifest. If that folder is not writable, make another manifest "
            "for the same tars (arc-ds shards index FOLDER --out OTHER), tokenize OTHER and use it as the source of a "
            "new run."
        )
        raise StorageError(f"{job.folder} cannot be written: {error}. {cure}") from error


def _build_cache(job: _CacheJob, workers: int, progress: bool) -> CacheSummary:
    """Tokenise the shards that a cache lacks. Rewrites the index of the cache after each shard."""
    infos, folder, fingerprint = job.shards.manifest.shards, job.folder, job.tokenizer.fingerprint
    done = _finished(job.shards.manifest, folder, fingerprint)
    for stray in _strays(folder, done):
        stray.unlink()
    write_whole(folder / CACHE_FILE, CacheIndex(fingerprint=fingerprint, shards=done).to_json().encode())
    missing = [idx for idx, info in enumerate(infos) if info.name not in done]
    with tqdm(total=len(job.shards), unit="record", disable=not progress) as bar:
        bar.update(sum(cached.records for cached in done.values()))
        for shard_idx, cached in _made(job, missing, workers):
            done[infos[shard_idx].name] = cached
            write_whole(folder / CACHE_FILE, CacheIndex(fingerprint=fingerprint, shards=done).to_json().encode())
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
        if _fault_of(folder, index, manifest, shard) is None
    }


def _strays(folder: Path, done: Mapping[str, CachedShard]) -> list[Path]:
    """The files in a cache folder that belong to no finished shard."""
    known = {CACHE_FILE, LOCK_FILE, *map(ids_name, done), *map(texts_name, done)}
    return sorted(path for path in folder.iterdir() if path.name not in known)


class _CacheJob(NamedTuple):
    """The inputs and target that all shards of one cache share."""

    path: str
    shards: ShardSet
    tokenizer: Tokenizer
    tokenizer_path: str
    folder: Path


def _made(job: _CacheJob, shard_idxs: Sequence[int], workers: int) -> Iterator[tuple[int, CachedShard]]:
    """Tokenise shards in parallel; yield each one when it is finished."""
    if min(workers, len(shard_idxs)) <= 1:
        for shard_idx in shard_idxs:
            yield shard_idx, _tokenize_shard(job.shards, shard_idx, job.tokenizer, job.folder)
        return
    with worker_pool(min(workers, len(shard_idxs)), _begin, job.path, job.tokenizer_path, job.folder) as pool:
        futures = {pool.submit(_tokenize, shard_idx): shard_idx for shard_idx in shard_idxs}
        for future in as_completed(futures):
            yield futures[future], future.result()


_worker: tuple[ShardSet, Tokenizer, Path] | None = None  # of a worker process


def _begin(path: str, tokenizer_path: str, folder: Path) -> None:
    global _worker
    _worker = ShardSet(path), load_tokenizer(tokenizer_path), folder


def _tokenize(shard_idx: int) -> CachedShard:
    assert _worker is not None, "a worker calls _begin before _tokenize"
    shards, tokenizer, folder = _worker
    return _tokenize_shard(shards, shard_idx, tokenizer, folder)


def _tokenize_shard(shards: ShardSet, shard_idx: int, tokenizer: Tokenizer, folder: Path) -> CachedShard:
    """Write the `.ids` and `.texts` files of one shard."""
    info = shards.manifest.shards[shard_idx]
    first = int(shards.shard_sizes[:shard_idx].sum())
    path = folder / ids_name(info.name)
    with whole_file(path) as file:
        writer = _ShardTokens(file, tokenizer)
        for record_idx in range(first, first + info.samples):
            try:
                writer.add(shards.record(record_idx))
            except DataError:  # a training run that reads the record reports the fault
                writer.leave_out()
    texts = dump_texts(writer.texts())
    write_whole(folder / texts_name(info.name), texts)
    return CachedShard(
        origin=origin_of(shards.manifest, info),
        records=info.samples,
        ids=writer.num_ids,
        left_out=writer.left_out,
        ids_sha256=writer.digest.hexdigest(),
        texts_sha256=hashlib.sha256(texts).hexdigest(),
        texts_bytes=len(texts),
    )


class _TextTokens(NamedTuple):
    """The tokens of a text.

    ids: uint32 [N].
    characters: uint8 [N], the number of characters that end with each token.
    """

    ids: NDArray[np.uint32]
    characters: NDArray[np.uint8]


_NO_TOKENS = _TextTokens(np.zeros(0, dtype="<u4"), np.zeros(0, dtype=np.uint8))


class _ShardTokens:
    """Appends the ids of records to a file and collects the content of the `.texts` file."""

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer) -> None:
        self._file = file
        self._tokenizer = tokenizer
        self._rows: list[tuple[int, int]] = [(0, 0)]
        self._checksums: list[int] = []
        self._lengths: list[int] = []
        self.digest = hashlib.sha256()
        self.num_ids = 0
        self.left_out = 0

    def add(self, record: Mapping[str, Any]) -> None:
        """Append the texts of a record."""
        self._append([self._encode(text) for text in texts_of(record)])

    def leave_out(self) -> None:
        """Append an unreadable record, without texts."""
        self.left_out += 1
        self._append([])

    def texts(self) -> ShardTexts:
        """The content of the `.texts` file."""
        return ShardTexts(
            np.array(self._rows, dtype=np.uint64),
            np.array(self._checksums, dtype=np.uint64),
            np.array(self._lengths, dtype=np.uint32),
        )

    def _encode(self, text: str) -> _TextTokens:
        """The tokens of a text; none if a token has more than `MAX_CHARACTERS` characters."""
        ids, ends = self._tokenizer.encode_with_ends(text)
        characters = np.diff(ends)
        if len(ids) and characters.max() <= MAX_CHARACTERS:
            return _TextTokens(ids.astype("<u4"), characters.astype(np.uint8))
        self.left_out += 1
        return _NO_TOKENS

    def _append(self, texts: Sequence[_TextTokens]) -> None:
        payload = b"".join([text.ids.tobytes() for text in texts] + [text.characters.tobytes() for text in texts])
        self._file.write(payload)
        self.digest.update(payload)
        self._lengths += [len(text.ids) for text in texts]
        self._checksums.append(xxhash.xxh64_intdigest(payload))
        self.num_ids += sum(len(text.ids) for text in texts)
        self._rows.append((self.num_ids, len(self._lengths)))


def check_token_caches(folder: Path, manifest: Manifest) -> list[Fault]:
    """Find every fault of the caches in a folder of manifest and indexes.

    Verifies that each cache is complete and belongs to these shards, and the sha256 of all its files. No cache is no
    fault.
    """
    faults = []
    for cache in sorted(folder.glob(f"{PREFIX}*")):
        try:
            index = read_cache_index(cache)
        except DataError as error:
            faults.append(Fault(cache.name, None, f"{error}. Remove the cache or run arc-ds shards tokenize again."))
            continue
        faults += [Fault(f"{cache.name}/{p.name}", None, "not in its index") for p in _strays(cache, index.shards)]
        for shard in manifest.shards:
            what = _fault_of(cache, index, manifest, shard)
            if what is not None:
                faults.append(Fault(f"{cache.name}/{ids_name(shard.name)}", None, what))
        gone = index.shards.keys() - {shard.name for shard in manifest.shards}
        faults += [Fault(f"{cache.name}/{ids_name(name)}", None, "its shard no longer exists") for name in sorted(gone)]
    return faults


def _fault_of(cache: Path, index: CacheIndex, manifest: Manifest, shard: ShardInfo) -> str | None:
    """The fault of one shard's files in a cache; None if there is none."""
    cached = index.shards.get(shard.name)
    if cached is None:
        return "missing: the cache is unfinished"
    if not is_of(cached, manifest, shard):
        return "stale: the shard has since been built or indexed again. Run arc-ds shards tokenize again."
    if (fault := wrong_size(cache, cached, shard.name)) is not None:
        return fault
    for file in cached.files(shard.name):
        if sha256_of_file(cache / file.name) != file.sha256:
            return f"the sha256 of {file.name} does not match. Run arc-ds shards tokenize again."
    return None

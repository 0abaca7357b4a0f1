"""Reads token caches: files next to a set of shards with the ids of every text by one tokenizer.

A cache never changes a sample. If it is missing, truncated, or belongs to older shards or another tokenizer, texts are
tokenised on the fly and a warning says so.

Shape letters: N tokens.
"""

from __future__ import annotations

import bisect
import logging
import mmap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from arc_ds.errors import ConfigError, DataError, StorageError
from arc_ds.shards.descriptors import descriptor_shortage
from arc_ds.shards.files import SideFile
from arc_ds.shards.mappings import MappedFiles, map_file, with_descriptors
from arc_ds.shards.reader import ShardSet
from arc_ds.shards.token_cache.files import (
    CACHE_FILE,
    MAX_INDEX_BYTES,
    PREFIX,
    TOKEN_BYTES,
    CacheIndex,
    ShardTexts,
    cache_name,
    map_texts,
    mismatch,
    parse_cache_index,
    read_cache_index,
    texts_of,
    wrong_size,
)
from arc_ds.tokenizers import Encoding, Tokenizer

logger = logging.getLogger(__name__)


def open_token_cache(shards: ShardSet, tokenizer: Tokenizer) -> TokenCache | None:
    """Open the cache of these shards for this tokenizer; None if there is no usable cache.

    The cache of shards at a URL is either at that URL, or next to the local copy of the manifest if
    `arc-ds shards tokenize URL` made it. The function checks file sizes, the origin of the texts and the tokenizer's
    fingerprint. It logs a warning if a cache does not match, or if a local folder has caches of other tokenizers only.

    Raises StorageError if too many files are open.
    """
    fingerprint = tokenizer.fingerprint
    faults = []
    for is_fetched, find in ((False, _local_index), (True, _fetched_index)):
        try:
            if (index := with_descriptors(partial(find, shards, fingerprint))) is not None:
                return TokenCache(shards, index, is_fetched=is_fetched)
        except (DataError, StorageError, ConfigError) as error:
            if descriptor_shortage(error) is not None:
                raise
            fault, is_unfit = str(error).rstrip("."), isinstance(error, DataError)  # stale, cut, unfinished
            faults.append(f"{fault}. Run arc-ds shards tokenize again." if is_unfit else f"{fault}.")
    if faults:
        logger.warning(
            "%s: texts are tokenised on the fly, because its token cache %s is not used: %s",
            *(shards.name, cache_name(fingerprint), " ".join(faults)),
        )
    elif others := sorted(path.name for path in shards.folder.glob(f"{PREFIX}*")):
        logger.warning(
            "%s has token caches (%s), but none of the tokenizer %s…: its texts are tokenised on the fly. Run "
            "arc-ds shards tokenize with that tokenizer.",
            *(shards.name, ", ".join(others), fingerprint[:16]),
        )
    return None


def _local_index(shards: ShardSet, fingerprint: str) -> CacheIndex | None:
    """The index of the cache next to the manifest; None if there is no cache. DataError if the cache does not match."""
    folder = shards.folder / cache_name(fingerprint)
    if not folder.is_dir():
        return None
    index = read_cache_index(folder)
    fault = mismatch(shards.manifest, index, fingerprint)
    sizes = (wrong_size(folder, index.shards[shard.name], shard.name) for shard in shards.manifest.shards)
    if fault := fault or next(filter(None, sizes), None):
        raise DataError(fault)
    return index


def _fetched_index(shards: ShardSet, fingerprint: str) -> CacheIndex | None:
    """Like `_local_index`, but for a cache at a URL.

    Raises StorageError if the cache exists but cannot be fetched, and ConfigError if one of its files alone exceeds
    data.cache_gib.
    """
    files = shards.files
    if files.base is None or files.cache is None:
        return None
    name = f"{cache_name(fingerprint)}/{CACHE_FILE}"
    raw = files.fetch_beside(name, max_bytes=MAX_INDEX_BYTES)
    if raw is None:
        logger.info("%s: no token cache found (%s)", shards.name, name)
        return None
    index = parse_cache_index(raw, name)
    if fault := mismatch(shards.manifest, index, fingerprint):
        raise DataError(fault)
    largest = max(file.num_bytes for name, shard in index.shards.items() for file in shard.files(name))
    if largest > files.cache.max_bytes:
        raise ConfigError(f"one of its files has {largest} bytes, more than data.cache_gib allows. Raise it.")
    return index


class KnownText(NamedTuple):
    """A text and its encoding."""

    text: str
    encoding: Encoding


class TokenCache:
    """The token ids of the texts of a set of shards by one tokenizer. `open_token_cache` opens it.

    Files are memory-mapped on first use; files at a URL are fetched first. Each process opens its own caches, as it
    loads its own tokenizers.
    """

    def __init__(self, shards: ShardSet, index: CacheIndex, *, is_fetched: bool = False) -> None:
        self.fingerprint = index.fingerprint
        self._files = _CacheFiles(shards, index, is_fetched=is_fetched)
        self._damaged = self._files.damaged
        sizes = np.array([index.shards[shard.name].records for shard in shards.manifest.shards], dtype=np.int64)
        self._first: list[int] = (np.cumsum(sizes) - sizes).tolist()
        self._is_named = False
        self._shards = MappedFiles(
            self._files.open, num_files=2, num_bytes=self._files.largest_bytes, cache=self._files.kept_in
        )

    def known(self, record_idx: int, record: Mapping[str, Any]) -> list[KnownText]:
        """The texts of a record with their encodings, except texts that were left out of the cache.

        If the cached ids of the record are damaged, the result is empty. The first such record is logged as a warning.
        """
        shard_idx = bisect.bisect_right(self._first, record_idx) - 1
        if shard_idx in self._damaged:
            return []
        try:
            texts = texts_of(record)
            encodings = self._read(shard_idx, record_idx - self._first[shard_idx])
            if len(encodings) != len(texts):
                if not encodings:
                    return []
                raise DataError(f"the cache has {len(encodings)} texts, the record has {len(texts)}")
            found = zip(texts, encodings, strict=True)
            return [KnownText(text, encoding) for text, encoding in found if _is_of(encoding, text)]
        except DataError as error:
            if not self._is_named:
                self._is_named = True
                logger.warning(
                    "%s, token cache %s, record %d: %s. Such texts are tokenised on the fly.",
                    *(self._files.shards.name, self._files.name, record_idx, str(error).rstrip(".")),
                )
            return []

    def _read(self, shard_idx: int, row: int) -> list[Encoding]:
        """The encodings of the texts of a record, checksum verified. A text that was left out has no ids."""
        tokens, texts = self._shards[shard_idx]
        (first, first_text), (end, end_text) = texts.first[row : row + 2].tolist()
        payload = tokens[first * TOKEN_BYTES : end * TOKEN_BYTES]
        if xxhash.xxh64_intdigest(payload) != texts.checksums.item(row):
            raise self._files.wrong_sum(shard_idx)
        ids = np.frombuffer(payload, dtype="<u4", count=end - first)
        characters = np.frombuffer(payload, dtype=np.uint8, offset=4 * (end - first))
        if end_text - first_text == 1:
            return [Encoding(ids, _ends(characters))]
        cuts = np.cumsum(texts.lengths[first_text:end_text], dtype=np.int64)[:-1]
        pieces = zip(np.split(ids, cuts), np.split(characters, cuts), strict=True)
        return [Encoding(piece, _ends(of_piece)) for piece, of_piece in pieces] if end_text > first_text else []


class _CacheFiles:
    """The files of a token cache.

    The object holds no reference to `TokenCache`, so that its memory maps are closed together with the `TokenCache`.

    name: name of their folder.
    shards: the files of the set of shards.
    kept_in: the local cache that the files are fetched into; None if they are local.
    largest_bytes: the largest size of one shard's files.
    damaged: indices of the shards whose files could not be opened.
    """

    def __init__(self, shards: ShardSet, index: CacheIndex, *, is_fetched: bool) -> None:
        self.name = cache_name(index.fingerprint)
        self.shards = shards.files
        self.kept_in = shards.files.cache if is_fetched else None
        of_shards = {shard.name: index.shards[shard.name].files(shard.name) for shard in shards.manifest.shards}
        self._of_shards = list(of_shards.values())
        self.largest_bytes = max(ids.num_bytes + table.num_bytes for ids, table in self._of_shards)
        self.damaged: set[int] = set()
        self._sound: set[int] = set()  # shards whose files have been opened and verified
        if is_fetched:  # prefetched together with the tar
            shards.files.beside[self.name] = of_shards

    def open(self, shard_idx: int) -> tuple[mmap.mmap | bytes, ShardTexts]:
        """Memory-map the ids of a shard and the positions of its texts.

        If this fails, it raises DataError and adds the shard to `damaged`.
        """
        ids, table = self._of_shards[shard_idx]
        try:
            with self._open_file(table) as file:
                texts = map_texts(file, table, is_known=shard_idx in self._sound)
            with self._open_file(ids) as file:
                tokens = map_file(file)
        except (OSError, ValueError, DataError, StorageError) as error:
            if descriptor_shortage(error) is not None:
                raise
            self.damaged.add(shard_idx)
            name = self.shards.manifest.shards[shard_idx].name
            raise DataError(f"the ids of {name} cannot be opened: {error}") from error
        self._sound.add(shard_idx)
        return tokens, texts

    def wrong_sum(self, shard_idx: int) -> DataError:
        """The error, with the remedy, for ids of a shard that do not match their checksum."""
        ids, _ = self._of_shards[shard_idx]
        cure = "Run arc-ds shards check" if self.kept_in is None else f"Delete {self.shards.kept_path(ids)}"
        return DataError(f"the checksum of its ids in {ids.name} does not match. {cure}")

    def _open_file(self, file: SideFile) -> IO[bytes]:
        if self.kept_in is not None:
            return self.shards.open_beside(self.name, file)
        return (self.shards.folder / self.name / file.name).open("rb")


def _ends(characters: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Token boundaries, int64 [N + 1], from the number of characters that end with each token, [N]."""
    ends = np.zeros(len(characters) + 1, dtype=np.int64)
    np.add.accumulate(characters, out=ends[1:])
    return ends


def _is_of(encoding: Encoding, text: str) -> bool:
    """Whether the cache contains the text. Raises DataError if the encoding belongs to another text."""
    num_characters = encoding.ends.item(-1)
    if num_characters == len(text):
        return True
    if len(encoding.ids):
        raise DataError(f"its ids have {num_characters} characters, the text has {len(text)}")
    return False


class KnownTexts:
    """A tokenizer that looks up the encodings of some texts: the same ids without tokenising again."""

    __slots__ = ("_known", "_tokenizer", "bos_id", "eos_id", "fingerprint", "special_ids", "vocab_size")

    def __init__(self, tokenizer: Tokenizer, known: Sequence[KnownText]) -> None:
        self._tokenizer = tokenizer
        self._known = known
        self.bos_id = tokenizer.bos_id
        self.eos_id = tokenizer.eos_id
        self.vocab_size = tokenizer.vocab_size
        self.fingerprint = tokenizer.fingerprint
        self.special_ids = tokenizer.special_ids

    def encode(self, text: str) -> list[int]:
        known = self._find(text)
        return self._tokenizer.encode(text) if known is None else known.ids.tolist()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_with_ends(self, text: str) -> Encoding:
        return self._find(text) or self._tokenizer.encode_with_ends(text)

    def _find(self, text: str) -> Encoding | None:
        """Find a text by comparison: a record has few texts, and hashing a long one takes longer."""
        for known in self._known:
            if known.text == text:
                return known.encoding
        return None

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def save(self, folder: Path) -> None:
        self._tokenizer.save(folder)


def with_known(
    tokenizer: Tokenizer, cache: TokenCache | None, record_idxs: Sequence[int], records: Sequence[Mapping[str, Any]]
) -> Tokenizer:
    """The tokenizer with the cached encodings of some records; the tokenizer itself if there is no cache."""
    if cache is None:
        return tokenizer
    known = map(cache.known, record_idxs, records)
    return KnownTexts(tokenizer, [text for of_record in known for text in of_record])

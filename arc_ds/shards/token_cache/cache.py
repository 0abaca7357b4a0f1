"""Reads token caches: files next to a set of shards with the ids of every text by one tokenizer.

A cache never changes a sample. If it is missing, truncated, or belongs to older shards or another tokenizer, texts are
tokenised on the fly and a warning says so.

Shape letters: N tokens.
"""

from __future__ import annotations

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
from arc_ds.shards.mappings import MappedFiles, descriptor_shortage, map_file, with_descriptors
from arc_ds.shards.reader import ShardSet
from arc_ds.shards.storage.cache import KnownFile
from arc_ds.shards.token_cache.files import (
    CACHE_FILE,
    MAX_INDEX_BYTES,
    PREFIX,
    TOKEN_BYTES,
    CacheIndex,
    ShardTexts,
    cache_name,
    find_fault,
    map_texts,
    parse_cache_index,
    read_cache_index,
    texts_of,
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
    return _fitting(read_cache_index(folder), shards, fingerprint, folder) if folder.is_dir() else None


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
    index = _fitting(parse_cache_index(raw, name), shards, fingerprint)
    largest = max(file.num_bytes for name, shard in index.shards.items() for file in shard.files(name))
    if largest > files.cache.max_bytes:
        raise ConfigError(f"one of its files has {largest} bytes, more than data.cache_gib allows. Raise it.")
    return index


def _fitting(index: CacheIndex, shards: ShardSet, fingerprint: str, folder: Path | None = None) -> CacheIndex:
    """The index, if the cache belongs to these shards and this tokenizer. Otherwise raises DataError.

    folder: local folder of the cache, to check the sizes of its files.
    """
    if index.fingerprint != fingerprint:
        raise DataError(f"it belongs to the tokenizer {index.fingerprint[:16]}…, not {fingerprint[:16]}…")
    for shard in shards.manifest.shards:
        if (fault := find_fault(index, shards.manifest, shard, folder)) is not None:
            raise DataError(fault)
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

    def __init__(self, shards: ShardSet, index: CacheIndex, *, is_fetched: bool) -> None:
        self._set = shards.files
        self._name = cache_name(index.fingerprint)
        self._cache = shards.files.cache if is_fetched else None  # that the files are fetched into
        names = [shard.name for shard in shards.manifest.shards]
        files = {name: [self._located(file) for file in index.shards[name].files(name)] for name in names}
        if is_fetched:  # prefetched together with the tar
            shards.files.beside[self._name] = files
        self._files = list(files.values())  # [ids, texts] of each shard
        self._place = shards.place
        self._damaged: set[int] = set()  # shards whose files could not be opened
        self._sound: set[int] = set()  # shards whose files have been opened and verified
        self._is_named = False
        largest_bytes = max(ids.num_bytes + texts.num_bytes for ids, texts in self._files)
        self._shards = MappedFiles[tuple[mmap.mmap | bytes, ShardTexts]](
            num_files=2, num_bytes=largest_bytes, cache=self._cache
        )

    def _located(self, file: KnownFile) -> KnownFile:
        """A file of the cache with its URL or path."""
        name = f"{self._name}/{file.address}"
        return file._replace(
            address=str(self._set.folder / name) if self._cache is None else self._set.address_beside(name)
        )

    def known(self, record_idx: int, record: Mapping[str, Any]) -> list[KnownText]:
        """The texts of a record with their encodings, except texts that were left out of the cache.

        If the cached ids of the record are damaged, the result is empty. The first such record is logged as a warning.
        """
        shard_idx, row = self._place(record_idx)
        if shard_idx in self._damaged:
            return []
        try:
            texts = texts_of(record)
            encodings = self._read(shard_idx, row)
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
                    *(self._set.name, self._name, record_idx, str(error).rstrip(".")),
                )
            return []

    def _read(self, shard_idx: int, row: int) -> list[Encoding]:
        """The encodings of the texts of a record, checksum verified. A text that was left out has no ids."""
        tokens, texts = self._shards.get(shard_idx, self._open)
        (first, first_text), (end, end_text) = texts.first[row : row + 2].tolist()
        payload = tokens[first * TOKEN_BYTES : end * TOKEN_BYTES]
        if xxhash.xxh64_intdigest(payload) != texts.checksums.item(row):
            ids_file, _ = self._files[shard_idx]
            cure = "Run arc-ds shards check" if self._cache is None else f"Delete {self._cache.path(ids_file)}"
            raise DataError(f"the checksum of its ids in {Path(ids_file.address).name} does not match. {cure}")
        ids = np.frombuffer(payload, dtype="<u4", count=end - first)
        characters = np.frombuffer(payload, dtype=np.uint8, offset=4 * (end - first))
        if end_text - first_text == 1:
            return [Encoding(ids, _ends(characters))]
        cuts = np.cumsum(texts.lengths[first_text:end_text], dtype=np.int64)[:-1]
        pieces = zip(np.split(ids, cuts), np.split(characters, cuts), strict=True)
        return [Encoding(piece, _ends(of_piece)) for piece, of_piece in pieces] if end_text > first_text else []

    def _open(self, shard_idx: int) -> tuple[mmap.mmap | bytes, ShardTexts]:
        """Memory-map the ids of a shard and the positions of its texts.

        If this fails, it raises DataError and adds the shard to `_damaged`.
        """
        ids, texts = self._files[shard_idx]
        try:
            with self._open_file(texts) as file:
                table = map_texts(file, texts, is_known=shard_idx in self._sound)
            with self._open_file(ids) as file:
                tokens = map_file(file)
        except (OSError, ValueError, DataError, StorageError) as error:
            if descriptor_shortage(error) is not None:
                raise
            self._damaged.add(shard_idx)
            name = self._set.manifest.shards[shard_idx].name
            raise DataError(f"the ids of {name} cannot be opened: {error}") from error
        self._sound.add(shard_idx)
        return tokens, table

    def _open_file(self, file: KnownFile) -> IO[bytes]:
        return open(file.address, "rb") if self._cache is None else self._cache.open(file)


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


class KnownTexts(Tokenizer):
    """A tokenizer that looks up the encodings of some texts: the same ids without tokenising again."""

    def __init__(self, tokenizer: Tokenizer, known: Sequence[KnownText]) -> None:
        self._tokenizer = tokenizer
        self._known = known
        self.bos_id = tokenizer.bos_id
        self.eos_id = tokenizer.eos_id
        self.vocab_size = tokenizer.vocab_size
        self.text_vocab_size = tokenizer.text_vocab_size
        self.fingerprint = tokenizer.fingerprint
        self.special_ids = tokenizer.special_ids

    def encode(self, text: str) -> list[int]:
        known = self._find(text)
        return self._tokenizer.encode(text) if known is None else known.ids.tolist()

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

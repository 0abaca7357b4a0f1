"""The token cache: ids of every text of a set of shards, by one tokenizer, beside the shards (design 7).

A cache is the folder `tokens-FINGERPRINT` in the folder of manifest and indexes (the first 16 digits of the tokenizer's
fingerprint). It holds `cache.json`, and for each shard `NAME.ids` and `NAME.texts`. The first has for each record the
ids of all its texts end to end, as little-endian uint32, and behind them for each id, as one byte, how many characters
end with it (a text's boundaries are their sums). The second is three .npy arrays: the first id and the first text of
each record, uint64 [records + 1, 2], the last row being the end; xxh64 of what `NAME.ids` has of each record, uint64
[records]; and the number of ids of each text, uint32 [texts].

A cache never changes a sample: where it is missing, cut, of older shards or of another tokenizer, texts are tokenised
on the fly, and a warning says so.

Shape letters: N tokens.
"""

from __future__ import annotations

import bisect
import io
import json
import logging
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from arc_ds.data.records import fine_tuning_record
from arc_ds.data.shards.format import sha256_of_file
from arc_ds.data.shards.reader import ShardSet
from arc_ds.data.tokenizers import Encoding, Tokenizer
from arc_ds.errors import DataError

logger = logging.getLogger(__name__)

FORMAT = "arc-ds-token-cache"
VERSION = 2
CACHE_FILE = "cache.json"
PREFIX = "tokens-"
TOKEN_BYTES = 5  # an id, and the characters that end with it
MAX_CHARACTERS = 255  # of one token
_MAX_OPEN = 64  # as for shards: a mapping holds a file descriptor


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedShard:
    """One shard of a cache. shard_sha256: of the tar whose texts these are. ids: how many, of all texts together.
    left_out: records or texts that are not in it, because they cannot be read or a token has too many characters."""

    shard_sha256: str
    records: int
    ids: int
    left_out: int
    ids_sha256: str
    texts_sha256: str
    texts_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheIndex:
    """What `cache.json` says: the whole fingerprint of the tokenizer, and the shards that are done, by name."""

    fingerprint: str
    shards: Mapping[str, CachedShard]

    def to_json(self) -> str:
        shards = {name: asdict(shard) for name, shard in sorted(self.shards.items())}
        spec = {"format": FORMAT, "version": VERSION, "fingerprint": self.fingerprint, "shards": shards}
        return json.dumps(spec, indent=1) + "\n"


class ShardTexts(NamedTuple):
    """The `.texts` file of a shard (see above)."""

    first: NDArray[np.uint64]
    checksums: NDArray[np.uint64]
    lengths: NDArray[np.uint32]


def cache_folder(shards_folder: Path, fingerprint: str) -> Path:
    """Where the cache of a tokenizer lies."""
    return shards_folder / f"{PREFIX}{fingerprint[:16]}"


def ids_name(shard_name: str) -> str:
    return Path(shard_name).stem + ".ids"


def texts_name(shard_name: str) -> str:
    return Path(shard_name).stem + ".texts"


def texts_of(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The texts of a record that are cached, in the order they are cached in; DataError as for `records`."""
    return (record["text"],) if "text" in record else fine_tuning_record(dict(record)).texts


def read_cache_index(folder: Path) -> CacheIndex:
    """What `cache.json` of a cache's folder says; DataError where it is missing, damaged or of another version."""
    path = folder / CACHE_FILE
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        if spec["format"] != FORMAT or spec["version"] != VERSION:
            raise DataError(f"{path}: expected format {FORMAT} version {VERSION}")
        shards = {str(name): CachedShard(**shard) for name, shard in spec["shards"].items()}
        return CacheIndex(fingerprint=str(spec["fingerprint"]), shards=shards)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({type(error).__name__}: {error})") from error


def read_texts(path: Path, shard: CachedShard) -> ShardTexts:
    """The `.texts` file of a shard; DataError where it is missing or not the one that `cache.json` names."""
    try:
        if sha256_of_file(path) != shard.texts_sha256:
            raise DataError(f"{path}: its sha256 is not the one in {CACHE_FILE}")
        with path.open("rb") as file:
            return ShardTexts(*(np.load(file, allow_pickle=False) for _ in range(3)))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def dump_texts(texts: ShardTexts) -> bytes:
    """The content of a `.texts` file."""
    buffer = io.BytesIO()
    for array in texts:
        np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def open_token_cache(shards: ShardSet, tokenizer: Tokenizer) -> TokenCache | None:
    """The cache of these shards by this tokenizer, None where there is none that can be used.

    Sizes, the shards' sums and the fingerprint are checked; a cache that does not match is named in a warning, and
    so is a folder with caches of other tokenizers only. A URL's cache lies where its manifest is kept locally.
    """
    folder = cache_folder(shards.folder, tokenizer.fingerprint)
    if not folder.is_dir():
        others = sorted(path.name for path in shards.folder.glob(f"{PREFIX}*"))
        if others:
            logger.warning(
                "%s has token caches (%s), but none of the tokenizer %s…: its texts are tokenised on the fly. Run "
                "arc-ds shards tokenize with that tokenizer.",
                *(shards.name, ", ".join(others), tokenizer.fingerprint[:16]),
            )
        return None
    try:
        index = read_cache_index(folder)
        fault = mismatch(shards, folder, index, tokenizer.fingerprint)
    except DataError as error:
        fault = str(error)
    if fault is not None:
        logger.warning(
            "token cache %s is not used: %s. Texts are tokenised on the fly. Run arc-ds shards tokenize again.",
            *(folder, fault),
        )
        return None
    return TokenCache(shards, folder, index)


def mismatch(shards: ShardSet, folder: Path, index: CacheIndex, fingerprint: str) -> str | None:
    """Why a cache is not that of these shards and this tokenizer, None where it is."""
    if index.fingerprint != fingerprint:
        return f"it is of the tokenizer {index.fingerprint[:16]}…, not {fingerprint[:16]}…"
    for shard in shards.manifest.shards:
        cached = index.shards.get(shard.name)
        if cached is None:
            return f"it is unfinished, {shard.name} is not in it"
        if cached.shard_sha256 != shard.sha256:
            return f"it is stale, {shard.name} has been built again since"
        if (fault := wrong_size(folder, shard.name, cached)) is not None:
            return fault
    return None


def wrong_size(folder: Path, shard_name: str, cached: CachedShard) -> str | None:
    """What is wrong with the sizes of a cached shard's files, None where nothing is."""
    expected = {ids_name(shard_name): cached.ids * TOKEN_BYTES, texts_name(shard_name): cached.texts_bytes}
    for name, size in expected.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            return f"{name} is missing" if found is None else f"{name} has {found} bytes, expected {size}"
    return None


class KnownText(NamedTuple):
    """A text and its encoding."""

    text: str
    encoding: Encoding


class TokenCache:
    """The ids of the texts of a set of shards by one tokenizer. Opened by `open_token_cache`.

    Files are mapped when first needed. Each process opens caches for itself, as it loads tokenizers.
    """

    def __init__(self, shards: ShardSet, folder: Path, index: CacheIndex) -> None:
        self.fingerprint = index.fingerprint
        self._folder = folder
        self._names = [shard.name for shard in shards.manifest.shards]
        self._cached = [index.shards[name] for name in self._names]
        sizes = np.array([cached.records for cached in self._cached], dtype=np.int64)
        self._first: list[int] = (np.cumsum(sizes) - sizes).tolist()
        self._damaged: set[int] = set()  # shards whose files cannot be opened
        self._is_named = False
        self._shard = lru_cache(maxsize=_MAX_OPEN)(self._open)

    def known(self, record_idx: int, record: Mapping[str, Any]) -> list[KnownText]:
        """The texts of a record with their encodings; those left out of the cache are missing.

        All are, and a warning names it once, where the cache's ids of the record turn out to be damaged.
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
                raise DataError(f"it has {len(encodings)} texts, the record has {len(texts)}")
            found = zip(texts, encodings, strict=True)
            return [KnownText(text, encoding) for text, encoding in found if _is_of(encoding, text)]
        except DataError as error:
            if not self._is_named:
                self._is_named = True
                logger.warning(
                    "token cache %s, record %d: %s. Such texts are tokenised on the fly. Run arc-ds shards check.",
                    *(self._folder, record_idx, error),
                )
            return []

    def _read(self, shard_idx: int, row: int) -> list[Encoding]:
        """The encodings of each text of a record, verified; of no id for a text that is left out."""
        tokens, texts = self._shard(shard_idx)
        (first, first_text), (end, end_text) = texts.first[row : row + 2].tolist()
        payload = tokens[first * TOKEN_BYTES : end * TOKEN_BYTES]
        if xxhash.xxh64_intdigest(payload) != texts.checksums.item(row):
            raise DataError(f"the checksum of its ids in {ids_name(self._names[shard_idx])} is not the one written")
        ids = np.frombuffer(payload, dtype="<u4", count=end - first)
        characters = np.frombuffer(payload, dtype=np.uint8, offset=4 * (end - first))
        if end_text - first_text == 1:
            return [Encoding(ids, _ends(characters))]
        cuts = np.cumsum(texts.lengths[first_text:end_text], dtype=np.int64)[:-1]
        pieces = zip(np.split(ids, cuts), np.split(characters, cuts), strict=True)
        return [Encoding(piece, _ends(of_piece)) for piece, of_piece in pieces] if end_text > first_text else []

    def _open(self, shard_idx: int) -> tuple[mmap.mmap | bytes, ShardTexts]:
        name, cached = self._names[shard_idx], self._cached[shard_idx]
        self._damaged.add(shard_idx)  # until it is open
        texts = read_texts(self._folder / texts_name(name), cached)
        try:
            with (self._folder / ids_name(name)).open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if cached.ids else b""
        except (OSError, ValueError) as error:
            raise DataError(f"{ids_name(name)} cannot be mapped: {error}") from error
        self._damaged.discard(shard_idx)
        return mapped, texts


def _ends(characters: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Boundaries int64 [N + 1] from the characters that end with each token, [N]."""
    ends = np.zeros(len(characters) + 1, dtype=np.int64)
    np.add.accumulate(characters, out=ends[1:])
    return ends


def _is_of(encoding: Encoding, text: str) -> bool:
    """Whether the text is not left out; DataError where the encoding is another text's."""
    num_characters = encoding.ends.item(-1)
    if num_characters == len(text):
        return True
    if len(encoding.ids):
        raise DataError(f"its ids have {num_characters} characters, the text has {len(text)}")
    return False


class KnownTexts:
    """A tokenizer that knows the encodings of some texts: the same ids, without the work."""

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
        """By comparison: a record has few texts, and to hash a long one takes longer."""
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
    """The tokenizer, with what its cache knows of some records; the tokenizer itself where there is no cache."""
    if cache is None:
        return tokenizer
    known = map(cache.known, record_idxs, records)
    return KnownTexts(tokenizer, [text for of_record in known for text in of_record])

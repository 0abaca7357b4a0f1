"""Writing shards: tars of about equal size, each with an index. Equal records give identical bytes."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import xxhash

from arc_ds.shards.format import ShardInfo, write_index

_BLOCK = tarfile.BLOCKSIZE


class EncodedRecord(NamedTuple):
    """A serialised record.

    payload: its bytes.
    num_tokens: its number of tokens by the encoder's tokenizer.
    num_passages: number of passages of a fine-tuning record.
    passage_tokens: number of tokens in these passages.
    """

    payload: bytes
    num_tokens: int
    num_passages: int = 0
    passage_tokens: int = 0


class ShardWriter:
    """Writes records to tars in a folder, each with an index. Use it as a context manager.

    The output depends only on the records: it contains no times, owners or random names.

    folder: folder for tars and indexes.
    shard_bytes: approximate size of a tar.
    finished: shards that already exist; writing continues after them.
    """

    def __init__(self, folder: Path, shard_bytes: int, finished: Sequence[ShardInfo] = ()) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.shards: list[ShardInfo] = list(finished)
        self.num_records = sum(shard.samples for shard in finished)
        self.num_tokens = sum(shard.tokens for shard in finished)
        self._tar: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._rows: list[tuple[int, int, int, int]] = []  # of the index
        self._passage_tokens: Counter[str] = Counter()
        self._offset = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._tar is not None and kind is None:
            self._finish()
        elif self._tar is not None:
            self._tar.close()

    def write(self, record: EncodedRecord) -> bool:
        """Append one record as the member `KEY.json`, where KEY is its number among all records.

        Returns whether this record completes its shard, which is then on disk with its index.
        """
        if self._tar is None:
            self._begin()
        payload = record.payload
        header = tarfile.TarInfo(f"{self.num_records:09d}.json")
        header.size, header.mode = len(payload), 0o644
        self._append(header.tobuf(tarfile.USTAR_FORMAT))
        self._rows.append((self._offset, len(payload), xxhash.xxh64_intdigest(payload), record.num_tokens))
        if record.num_passages:
            self._passage_tokens[str(record.num_passages)] += record.passage_tokens
        self._append(payload + b"\0" * (-len(payload) % _BLOCK))
        self.num_records += 1
        self.num_tokens += record.num_tokens
        if self._offset < self.shard_bytes:
            return False
        self._finish()
        return True

    def _begin(self) -> None:
        path = self.folder / f"shard-{len(self.shards):06d}.tar"
        self._tar = path.open("wb")
        self._digest, self._rows, self._passage_tokens, self._offset = hashlib.sha256(), [], Counter(), 0

    def _append(self, data: bytes) -> None:
        assert self._tar is not None, "a shard is open while members are appended"
        self._tar.write(data)
        self._digest.update(data)
        self._offset += len(data)

    def _finish(self) -> None:
        """Finish the tar, write its index, and record both for the manifest."""
        end = 2 * _BLOCK
        self._append(b"\0" * (end + -(self._offset + end) % tarfile.RECORDSIZE))
        assert self._tar is not None, "a shard is open when it is finished"
        self._tar.flush()
        os.fsync(self._tar.fileno())
        name = Path(self._tar.name).name
        self._tar.close()
        self._tar = None
        self.shards.append(
            ShardInfo(
                name=name,
                samples=len(self._rows),
                tokens=sum(row[3] for row in self._rows),
                bytes=self._offset,
                sha256=self._digest.hexdigest(),
                index_sha256=write_index(self.folder / (Path(name).stem + ".idx"), self._rows),
                passage_tokens=dict(self._passage_tokens),
            )
        )

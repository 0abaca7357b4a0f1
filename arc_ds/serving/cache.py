"""A bounded cache of compressed vectors: in memory, then on the disk.

A key is a hash of everything that determines the vectors: the compressor's weights and sizes, its pooling factor, the
decoder's port, the marker, and the tokens of the text.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from threading import Lock

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from xxhash import xxh3_128_hexdigest

from arc_ds.batch.segments import Segment
from arc_ds.errors import StorageError
from arc_ds.model.weights.lazy_tensor import value_bytes
from arc_ds.system.files import output, write_whole

logger = logging.getLogger(__name__)

_NAME = "vectors"
_SUFFIX = ".safetensors"
_SUM = "xxh3_128"


def vector_key(model: str, decoder: int, context: Segment) -> str:
    """The key of a context's vectors for a decoder. `model`: see `inference.vectors.model_digest`."""
    digest = hashlib.sha256(f"{model} {decoder} {context.marker} ".encode())
    digest.update(context.ids.array.astype("<i8").tobytes())
    return digest.hexdigest()


class VectorCache:
    """Vectors by key. The least recently used ones make room. Safe for use by several threads.

    memory_bytes: bytes of the tensors in memory.
    folder: of one file per key; None for memory only. Several servers may share it: each reads the files of all.
    disk_bytes: bytes of the files. Several servers may exceed it by a sixteenth each.
    """

    def __init__(self, memory_bytes: int, folder: Path | None = None, disk_bytes: int = 0) -> None:
        self.memory_bytes = memory_bytes
        self.disk_bytes = disk_bytes
        self.used_bytes = 0
        self._folder = folder
        self._memory: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = Lock()
        self._files: OrderedDict[str, int] = OrderedDict()
        self._file_bytes = 0
        self._new_bytes = 0  # written since the files were listed
        self._is_broken = False
        if folder is not None:
            with output(folder):
                folder.mkdir(parents=True, exist_ok=True)
            self._list_files(folder)
            self._drop_files()

    def recall(self, key: str) -> Tensor | None:
        """Vectors from memory."""
        with self._lock:
            found = self._memory.get(key)
            if found is not None:
                self._memory.move_to_end(key)
            return found

    def read(self, key: str, width: int) -> Tensor | None:
        """Vectors from the disk, and into memory. A file that is damaged or of another width counts as absent."""
        if self._folder is None:
            return None
        path = self._path(key)
        try:
            raw = path.read_bytes()
        except OSError:
            return None
        found = _decode(raw)
        if found is None or found.dim() != 2 or found.shape[1] != width:
            self._forget(key)
            return None
        with suppress(OSError):  # the folder may be read-only
            os.utime(path)
        self._count(key, len(raw))
        self.keep(key, found)
        return found

    def keep(self, key: str, vectors: Tensor) -> None:
        """Put vectors into memory."""
        size = vectors.nbytes
        with self._lock:
            if size > self.memory_bytes or key in self._memory:
                return
            self._memory[key] = vectors
            self.used_bytes += size
            while self.used_bytes > self.memory_bytes:
                _, oldest = self._memory.popitem(last=False)
                self.used_bytes -= oldest.nbytes

    def write(self, key: str, vectors: Tensor) -> None:
        """Write vectors to the disk. After a failed write a warning says so, and no more are written."""
        if self._folder is None or self._is_broken:
            return
        raw = _encode(vectors)
        if len(raw) > self.disk_bytes:
            return
        path = self._path(key)
        try:
            with output(path, cure="Give another --cache-dir."):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, raw)
        except StorageError as error:
            self._is_broken = True
            logger.warning(f"vectors are no longer cached on the disk: {error}")
            return
        self._count(key, len(raw))
        self._new_bytes += len(raw)
        if self._new_bytes > self.disk_bytes // 16:
            self._list_files(self._folder)
        self._drop_files()

    def _list_files(self, folder: Path) -> None:
        """Count the files of all servers, the least recently used ones first."""
        found = sorted(_states(folder), key=lambda found: found[1].st_mtime)
        with self._lock:
            self._files = OrderedDict((path.stem, state.st_size) for path, state in found)
            self._file_bytes = sum(self._files.values())
            self._new_bytes = 0

    def _count(self, key: str, size: int) -> None:
        """Count a file as the most recently used one."""
        with self._lock:
            self._file_bytes += size - self._files.pop(key, 0)
            self._files[key] = size

    def _drop_files(self) -> None:
        while True:
            with self._lock:
                if self._file_bytes <= self.disk_bytes:
                    return
                oldest = next(iter(self._files))
            self._forget(oldest)

    def _forget(self, key: str) -> None:
        with self._lock:
            self._file_bytes -= self._files.pop(key, 0)
        with suppress(OSError):  # the folder may be read-only
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / key[:2] / f"{key}{_SUFFIX}"


def _encode(vectors: Tensor) -> bytes:
    """A safetensors file with a checksum of the values, which the format lacks."""
    tensor = vectors.detach().cpu().contiguous()
    return save({_NAME: tensor}, metadata={_SUM: xxh3_128_hexdigest(value_bytes(tensor))})


def _decode(raw: bytes) -> Tensor | None:
    """The vectors of `_encode`; None if the file is damaged."""
    try:
        found = load(raw)[_NAME]
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        return found if header["__metadata__"][_SUM] == xxh3_128_hexdigest(value_bytes(found)) else None
    except (SafetensorError, LookupError, ValueError):
        return None


def _states(folder: Path) -> Iterable[tuple[Path, os.stat_result]]:
    for path in folder.glob(f"??/*{_SUFFIX}"):
        try:
            yield path, path.stat()
        except OSError:  # another server has removed it
            continue

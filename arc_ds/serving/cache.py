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
from pathlib import Path
from threading import Lock

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from arc_ds.batch.segments import Segment
from arc_ds.errors import StorageError
from arc_ds.inference.arc import ArcModel
from arc_ds.system.files import output, write_whole

logger = logging.getLogger(__name__)

_NAME = "vectors"
_SUFFIX = ".safetensors"


def model_digest(model: ArcModel, decoder: int) -> bytes:
    """Hash of a compressor's weights, sizes and dtype, and of the port of one decoder."""
    digest = hashlib.sha256(json.dumps([model.spec.to_json(), decoder], sort_keys=True).encode())
    for name, parameter in sorted(model.compressor.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)} ".encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def vector_key(model: bytes, context: Segment) -> str:
    """The key of a context's vectors. `model`: see `model_digest`."""
    digest = hashlib.sha256(model + str(context.marker).encode() + b" ")
    digest.update(context.ids.array.astype("<i8").tobytes())
    return digest.hexdigest()


class VectorCache:
    """Vectors by key. The least recently used ones make room. Safe for use by several threads.

    memory_bytes: bytes of the tensors in memory.
    folder: of one file per key; None for memory only. Several servers may share it.
    disk_bytes: bytes of the files.
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
        self._is_broken = False
        if folder is not None:
            with output(folder):
                folder.mkdir(parents=True, exist_ok=True)
            for path, state in sorted(_states(folder), key=lambda found: found[1].st_mtime):
                self._files[path.stem] = state.st_size
                self._file_bytes += state.st_size
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
        if self._folder is None or key not in self._files:
            return None
        path = self._path(key)
        try:
            found = load_file(path)[_NAME]
            os.utime(path)
        except (OSError, SafetensorError, KeyError):
            found = None
        if found is None or found.dim() != 2 or found.shape[1] != width or not found.is_floating_point():
            self._forget(key)
            return None
        with self._lock:
            self._files.move_to_end(key)
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
        if self._folder is None or self._is_broken or key in self._files:
            return
        raw = save({_NAME: vectors.detach().cpu().contiguous()})
        if len(raw) > self.disk_bytes:
            return
        path = self._path(key)
        try:
            with output(path, cure="Give another --cache-dir."):
                path.parent.mkdir(exist_ok=True)
                write_whole(path, raw)
        except StorageError as error:
            self._is_broken = True
            logger.warning(f"vectors are no longer cached on the disk: {error}")
            return
        with self._lock:
            self._files[key] = len(raw)
            self._file_bytes += len(raw)
        self._drop_files()

    def _drop_files(self) -> None:
        while self._file_bytes > self.disk_bytes:
            self._forget(next(iter(self._files)))

    def _forget(self, key: str) -> None:
        with self._lock:
            self._file_bytes -= self._files.pop(key, 0)
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / key[:2] / f"{key}{_SUFFIX}"


def _states(folder: Path) -> Iterable[tuple[Path, os.stat_result]]:
    for path in folder.glob(f"??/*{_SUFFIX}"):
        try:
            yield path, path.stat()
        except OSError:  # another server has removed it
            continue

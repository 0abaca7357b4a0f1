"""Digests of a build's inputs, computed in the background while the build reads them."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from arc_ds.errors import DataError

_CHUNK = 1 << 20


class InputDigests:
    """Computes the sha256 of files in a background thread, one file at a time.

    A context manager; on exit it cancels unfinished computations.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._stopped = threading.Event()
        self._under_way: dict[Path, Future[str]] = {}

    def __enter__(self) -> InputDigests:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.shutdown(cancel_futures=True)

    def begin(self, path: Path) -> None:
        """Start to compute the digest of a file."""
        self._under_way[path] = self._thread.submit(self._digest, path)

    def take(self, path: Path) -> str:
        """Wait for the digest of a file passed to `begin`; return it in hex. DataError if the file cannot be read."""
        try:
            return self._under_way.pop(path).result()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error}). Repair, replace or leave out the file.") from error

    def _digest(self, path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while not self._stopped.is_set() and (chunk := file.read(_CHUNK)):
                digest.update(chunk)
        return digest.hexdigest()

"""Digests of the inputs of a build, computed while they are read."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from arc_ds.errors import DataError

_CHUNK = 1 << 20


class InputDigests:
    """Computes sha256 of files in a thread, one after the other; a context manager, which drops what is not done."""

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
        """Have a file's digest computed."""
        self._under_way[path] = self._thread.submit(self._digest, path)

    def take(self, path: Path) -> str:
        """The digest of a file that was begun, as hex digits; waits for it. DataError where it cannot be read."""
        try:
            return self._under_way.pop(path).result()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error}). Mend, replace or leave out the file.") from error

    def _digest(self, path: Path) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while not self._stopped.is_set() and (chunk := file.read(_CHUNK)):
                digest.update(chunk)
        return digest.hexdigest()

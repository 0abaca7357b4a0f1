"""A lock on a folder, so that only one process writes to it at a time."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from arc_ds.errors import DataError

logger = logging.getLogger(__name__)

LOCK_FILE = "lock"


@contextmanager
def writing(folder: Path, what: str) -> Iterator[None]:
    """Create a folder and hold an exclusive lock on it. The lock is the file `lock` in the folder, which stays.

    folder: the folder to lock.
    what: name of the writing operation in messages ("build").
    Raises DataError if another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    try:
        file: IO[bytes] = path.open("ab")
    except PermissionError:  # another user's; reading suffices for flock on most file systems
        file = path.open("rb")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another {what} is writing {folder}. Wait until it has finished.") from None
        except OSError as error:
            logger.warning("%s: this file system has no locks (%s); run one %s at a time", folder, error, what)
        yield

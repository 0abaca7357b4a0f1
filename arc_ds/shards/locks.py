"""A folder that one process writes at a time."""

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
    """Keep others out of a folder that is written, by the file `lock` in it, which stays.

    what: what writes it, for messages ("build"). DataError where another one does.
    """
    with _opened(folder / LOCK_FILE) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another {what} is writing {folder}. Wait for it.") from None
        except OSError as error:
            logger.warning("%s: this file system has no locks (%s); run one %s at a time", folder, error, what)
        yield


def _opened(path: Path) -> IO[bytes]:
    """One that another user has left behind can be locked without being written, though not on every file system."""
    try:
        return path.open("ab")
    except PermissionError:
        return path.open("rb")

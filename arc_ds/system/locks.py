"""A lock on a folder, so that only one process writes to it at a time."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from arc_ds.errors import ArcError, DataError

logger = logging.getLogger(__name__)

LOCK_FILE = "lock"
# The children of a process that was just killed may hold its lock for an instant.
_PATIENCE_S = 1.0
# A holder may remove the new folder at any point of its opening here, but hardly so often in a row.
_TRIES = 20


@contextmanager
def writing(
    folder: Path, what: str, error: type[ArcError] = DataError, cure: str = "Wait until it has finished."
) -> Iterator[None]:
    """Create a folder and hold an exclusive lock on it.

    The system frees the lock when the process ends, in whatever way. The lock is the file `lock` in the folder, which
    names the process. The end of the block removes it, and also the folder if that is new and empty.

    folder: the folder to lock.
    what: name of the writing operation in messages ("build").
    error: class of the error if another process holds the lock.
    cure: last sentence of that error.
    """
    created = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    with _locked(folder, what, error, cure) as file:
        _note(file, f"process {os.getpid()} on {socket.gethostname()}")
        try:
            yield
        finally:
            with suppress(OSError):  # the block may have removed the folder
                (folder / LOCK_FILE).unlink()
            with suppress(OSError):  # rmdir refuses a folder that holds something
                for path in created:
                    path.rmdir()
            fcntl.flock(file, fcntl.LOCK_UN)  # a child that was forked meanwhile also holds the descriptor


def _locked(folder: Path, what: str, error: type[ArcError], cure: str) -> IO[bytes]:
    """The open file of the lock. Raises `error` if another process holds it."""
    deadline, path = time.monotonic() + _PATIENCE_S, folder / LOCK_FILE
    tries = 0
    while True:
        try:
            file = _open(path)
        except (FileNotFoundError, FileExistsError):  # `mkdir` raises either for a folder that vanishes meanwhile
            tries += 1
            if tries == _TRIES:
                raise
        else:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.close()
                    raise error(f"another {what} is writing {folder}: {_holder(path)}. {cure}") from None
            except OSError as failure:
                logger.warning("%s: this file system has no locks (%s); run one %s at a time", folder, failure, what)
                return file
            else:
                with suppress(FileNotFoundError):  # its former holder has removed it
                    if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                        return file
            file.close()
        time.sleep(_PATIENCE_S / 10)


def _open(path: Path) -> IO[bytes]:
    """Open the lock; create it and its folder if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return path.open("ab", buffering=0)  # a full disk must not fail at its end
    except PermissionError:  # another user's; reading suffices for flock on most file systems
        if not path.exists():
            raise
        return path.open("rb", buffering=0)


def _holder(path: Path) -> str:
    with suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8", errors="replace") or "a process that has just begun"
    return "a process that has just ended"


def _note(file: IO[bytes], text: str) -> None:
    if file.writable():
        with suppress(OSError):  # a full disk: the lock works without the note
            file.truncate(0)
            file.write(text.encode())

"""Atomic and durable writes of files and folders.

Content is written under a temporary name in the same folder, synced to disk and renamed. A kill at any time leaves
either the old or the new file. After the rename the new content survives a power failure. Replacing a folder takes two
renames: a kill between them leaves the old folder as `.NAME.old-PID`, and an error restores it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file open for writing. If the block ends without an error, it is renamed to `path`, replacing an older file."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write or replace a file atomically."""
    with whole_file(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder. If the block ends without an error, it is renamed to `path`.

    The parent folder is created if missing. An existing folder at `path` is first moved aside and finally deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process with the same number, as in containers
    partial.mkdir()
    try:
        yield partial
        for written in partial.rglob("*"):
            sync_folder(written) if written.is_dir() else sync_file(written)
        replace_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(new: Path, path: Path) -> None:
    """Rename the folder `new`, whose files must be synced, to `path`.

    An existing folder there is finally deleted. If `new` cannot be renamed, it is restored.
    """
    sync_folder(new)
    old = path.with_name(f".{path.name}.old-{os.getpid()}") if path.exists() else None
    if old is not None:
        path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        if old is not None:
            old.rename(path)
        raise
    sync_folder(path.parent)
    if old is not None:
        shutil.rmtree(old)


def sync_file(path: Path) -> None:
    """Sync a file to disk. On a shared file system this covers only writes of this host."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Sync the entries of a folder (new names, renames) to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

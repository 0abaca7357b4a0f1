"""Files and folders that appear whole or not at all, and stay after a power cut once they are there.

Everything is written under another name next to its place, brought to the disk, and renamed. A kill at any instant
leaves the old content or the new one.
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
    """A file open for writing. It gets its name, and replaces an older file, if the block ends without an error."""
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
    """Write a file, or replace it."""
    with whole_file(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `path` when the block ends without an error; its parent is made.

    A folder that is there already is moved aside before and removed last.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        for written in partial.rglob("*"):
            sync_folder(written) if written.is_dir() else sync_file(written)
        replace_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(new: Path, path: Path) -> None:
    """Rename the folder `new`, whose files are on the disk, to `path`. A folder that is there is removed last."""
    old = path.with_name(f".{path.name}.old-{os.getpid()}") if path.exists() else None
    if old is not None:
        path.rename(old)
    sync_folder(new)
    new.rename(path)
    sync_folder(path.parent)
    if old is not None:
        shutil.rmtree(old)


def sync_file(path: Path) -> None:
    """Bring a file to the disk. On a shared file system that covers what this host has written."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Bring the entries of a folder (new names, renames) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Atomic and durable writes of files and folders, and their failure in words.

Content is written under a temporary name in the same folder, synced to disk and renamed. A kill at any time leaves
either the old or the new file. After the rename the new content survives a power failure. Replacing a folder takes two
renames: a kill between them leaves the old folder as `.NAME.old-PID`, and an error restores it.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import logging
import os
import shutil
import stat
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from arc_ds.errors import DiskFullError, StorageError

logger = logging.getLogger(__name__)

_MIB = 1 << 20


@contextmanager
def output(path: Path, cure: str = "", after: Callable[[], str] = str) -> Iterator[None]:
    """A block that writes `path`. Its failed writes are raised as StorageError with reason, free space and remedy.

    path: the file or folder that the user knows.
    cure: the remedy if the disk is not full; empty for the common one.
    after: returns a last sentence for the error, such as what remains whole.

    A full disk is a DiskFullError.
    """
    try:
        yield
    except Exception as error:
        failure = _failed_write(path, error)
        if failure is None:
            raise
        kind = DiskFullError if is_disk_full(failure) else StorageError
        if kind is DiskFullError:
            cure = "Free some space there and run the same command again, or give a folder of a larger disk."
        cure = cure or "Make it writable for this user and run the same command again, or give another folder."
        free = shutil.disk_usage(_nearest_folder(path)).free / _MIB
        raise kind(
            f"{path} cannot be written: {failure.strerror or failure} ({free:,.1f} MiB are free on its disk). "
            f"{cure} {after()}".rstrip()
        ) from error


def is_disk_full(error: OSError) -> bool:
    """Whether a write failed because the disk, the quota or the file size limit is exhausted."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _failed_write(path: Path, error: Exception) -> OSError | None:
    """The error of the failed write of `path`; None if `error` has another cause."""
    if isinstance(error, OSError):
        is_other = isinstance(error, (ConnectionError, TimeoutError)) or not _concerns(error.filename, path)
        return None if is_other else error
    if _is_of_writer(error):
        return _try_to_write(path) or OSError(errno.EIO, str(error).partition("\n")[0])
    return None


def _is_of_writer(error: Exception) -> bool:
    """Whether PyTorch or safetensors could not write a file. They have no class of error for it, and give no reason."""
    if type(error).__name__ == "SafetensorError":
        return True
    frames = traceback.walk_tb(error.__traceback__)
    return type(error) is RuntimeError and any(f.f_globals.get("__name__") == "torch.serialization" for f, _ in frames)


def _concerns(filename: object, path: Path) -> bool:
    """Whether a file that could not be opened is next to, below or above `path`. Others are inputs of the block."""
    if not isinstance(filename, (str, os.PathLike)):
        return True
    named, folder = Path(os.path.abspath(filename)), Path(os.path.abspath(path)).parent
    return folder in (named, *named.parents) or named in folder.parents


def _try_to_write(path: Path) -> OSError | None:
    """The error of a small write next to `path`."""
    try:
        with tempfile.TemporaryFile(dir=_nearest_folder(path)) as file:
            file.write(bytes(_MIB))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def _nearest_folder(path: Path) -> Path:
    return next(each for each in (path, *path.absolute().parents) if each.is_dir())


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
    sync(path.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write or replace a file atomically."""
    with whole_file(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def whole_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder. If the block ends without an error, it is renamed to `path`. Failed writes are as in `output`.

    The parent folder is created if missing. The partial folders of killed processes are deleted.

    overwrite: whether to replace a folder that exists at `path` by then. If not, StorageError is raised.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with output(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path)
            partial.mkdir()
            descriptor = os.open(partial, os.O_RDONLY)
            try:
                with suppress(OSError):  # some file systems have no locks on folders
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
                yield partial
                for written in partial.rglob("*"):
                    sync(written)
                _publish(partial, path, overwrite=overwrite)
            finally:
                os.close(descriptor)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # after `output`, which asks whether the disk is full


def _publish(partial: Path, path: Path, *, overwrite: bool) -> None:
    if overwrite:
        replace_folder(partial, path)
        return
    sync(partial)
    try:
        partial.rename(path)  # fails if another process has written a folder there meanwhile
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise StorageError(f"another process has written {path} meanwhile. Choose another folder.") from error
    sync(path.parent)


def _remove_leftovers(path: Path) -> None:
    """Delete the partial folders of killed processes, and name the whole ones that they had moved aside."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        with suppress(OSError):
            descriptor = os.open(partial, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if its process lives
                shutil.rmtree(partial)
            finally:
                os.close(descriptor)
    for old in path.parent.glob(f".{glob.escape(path.name)}.old-*"):
        logger.warning(
            "%s is an earlier %s, which a killed process had moved aside. Delete it, or rename it to get it back.",
            *(old, path),
        )


def replace_folder(new: Path, path: Path) -> None:
    """Rename the folder `new`, whose files must be synced, to `path`.

    An existing folder there is finally deleted. If `new` cannot be renamed, it is restored.
    """
    sync(new)
    old = path.with_name(f".{path.name}.old-{os.getpid()}") if path.exists() else None
    if old is not None:
        path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        if old is not None:
            old.rename(path)
        raise
    sync(path.parent)
    if old is not None:
        shutil.rmtree(old)


def file_size(path: Path) -> int | None:
    """Size in bytes; None if there is no such file. One look, so that it cannot vanish between two."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def sync(path: Path) -> None:
    """Sync a file, or the entries of a folder (new names, renames), to disk.

    On a shared file system this covers only writes of this host.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Read small files that users provide. All readers report the same faults, with the same remedies.

A folder that was cloned without Git LFS holds pointers: text files of about 130 bytes in place of large files. Files
that were saved on Windows may begin with a byte order mark, or be UTF-16.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from arc_ds.errors import ArcError

_LFS_HEAD = b"version https://git-lfs.github.com/spec/"
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file that begins with these bytes is a pointer of Git LFS."""
    return head.startswith(_LFS_HEAD)


def check_downloaded(path: Path, error: type[ArcError]) -> None:
    """Raise `error` if the file is a pointer of Git LFS. A file that cannot be opened passes: its reader reports it."""
    try:
        with path.open("rb") as file:
            head = file.read(len(_LFS_HEAD))
    except OSError:
        return
    if is_lfs_pointer(head):
        raise error(
            f"{path} is a pointer of Git LFS: the file itself was not downloaded. Run `git lfs install` and then "
            "`git lfs pull` in the repository, or download the file from the model's page."
        )


def read_user_text(path: Path, error: type[ArcError], *, remedy: str) -> str:
    """Read a text file in UTF-8, without its byte order mark if it has one.

    error: class of the error for a file that cannot be read, is not UTF-8, or is a pointer of Git LFS.
    remedy: last sentence of that error.
    """
    return decode_user_text(read_user_bytes(path, error, remedy=remedy), str(path), error, remedy=remedy)


def read_user_bytes(path: Path, error: type[ArcError], *, remedy: str, size: int = -1) -> bytes:
    """Read the first `size` bytes of a file, by default all. Raises `error` as `read_user_text` does."""
    try:
        with path.open("rb") as file:
            raw = file.read(size)
    except OSError as failure:
        raise error(f"{path} cannot be read: {failure.strerror or failure}. {remedy}") from failure
    check_downloaded(path, error)
    return raw


def decode_user_text(raw: bytes, where: str, error: type[ArcError], *, remedy: str) -> str:
    """Decode UTF-8 with or without a byte order mark. `where` and `remedy` are parts of the error."""
    if raw.startswith(_UTF16_MARKS):
        raise error(f"{where} is UTF-16, expected UTF-8. Convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        raise error(f"{where} is not UTF-8 ({failure}). {remedy}") from failure


def read_user_json(path: Path, error: type[ArcError], *, remedy: str) -> Any:
    """Read a JSON file as `read_user_text` reads a text file. The error names the line of a fault."""
    return parse_user_json(read_user_text(path, error, remedy=remedy), str(path), error, remedy=remedy)


def parse_user_json(text: str, where: str, error: type[ArcError], *, remedy: str) -> Any:
    """Parse JSON text. `where` and `remedy` are parts of the error."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as failure:
        raise error(f"{where}:{failure.lineno}: not valid JSON: {failure.msg}. {remedy}") from failure
    except (ValueError, RecursionError) as failure:  # numbers of thousands of digits; objects nested too deeply
        raise error(f"{where}: not valid JSON: {failure}. {remedy}") from failure


@contextmanager
def library_reads(package: str, what: str, error: type[ArcError]) -> Iterator[None]:
    """Raise `error` for whatever a library raises while it reads a user's file. Our own errors pass unchanged.

    Libraries document few of their exceptions: `tokenizers` raises plain Exception, and a panic of a Rust library is
    not even an Exception.

    package: name of the library on PyPI.
    what: the file, as the subject of the error's sentence.
    """
    try:
        yield
    except (ArcError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as failure:
        try:
            installed = version(package)
        except PackageNotFoundError:
            installed = "(unknown version)"
        kind = "" if type(failure) is Exception else f"{type(failure).__name__}: "
        raise error(
            f"{what} cannot be read by {package} {installed} ({kind}{failure}). It is damaged or newer than the "
            f"package. Update the package (pip install -U {package}), or copy the file again."
        ) from failure

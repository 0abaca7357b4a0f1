"""Read small files and texts that users provide. All readers report the same faults, with the same remedies.

A folder that was cloned without Git LFS holds pointers: text files of about 130 bytes in place of large files. Files
that were saved on Windows may begin with a byte order mark, or be UTF-16. Their texts may begin with a mark, too, if a
program copied them from such a file.
"""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from arc_ds.errors import ArcError, DataError

_LFS_HEAD = b"version https://git-lfs.github.com/spec/"
ICONV = "iconv -f {} -t UTF-8"
HEAD = 8  # bytes of a file that `check_is_utf8` needs
_MARK = "\ufeff"
_BETWEEN_VALUES = re.compile(rf"[\s{_MARK}]*")  # joined files keep their marks
# Encodings without a mark: which bytes of the first two characters are not zero, if these are ASCII.
_ZEROS_OF_ASCII = {
    "UTF-32LE": (True, False, False, False) * 2,
    "UTF-32BE": (False, False, False, True) * 2,
    "UTF-16LE": (True, False) * 2,
    "UTF-16BE": (False, True) * 2,
}


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
    refuse_pointer(head, str(path), error)


def refuse_pointer(head: bytes, where: str, error: type[ArcError]) -> None:
    """Raise `error` if a file that begins with these bytes is a pointer of Git LFS. `where` is part of the error."""
    if is_lfs_pointer(head):
        raise error(
            f"{where} is a pointer of Git LFS: the file itself was not downloaded. Run `git lfs install` and then "
            "`git lfs pull` in the repository, or download the file from the page of the model or data set."
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


def decode_user_text(
    raw: bytes,
    where: str,
    error: Callable[[str], Exception],
    *,
    remedy: str,
    convert: str = f"{ICONV} FILE > NEW",
    errors: str = "strict",
) -> str:
    """Decode UTF-8 with or without a byte order mark. `where` and `remedy` are parts of the error.

    convert: see `check_is_utf8`.
    errors: "replace" replaces invalid bytes.
    """
    check_is_utf8(raw[:HEAD], where, error, convert=convert)
    try:
        return without_mark(raw.decode("utf-8", errors))
    except UnicodeDecodeError as failure:
        raise error(f"{where} is not UTF-8 ({failure}). {remedy}") from failure


def without_mark(text: str) -> str:
    """The text without byte order marks at its start. Copying tools may keep the mark of a file in its first text."""
    return text.lstrip(_MARK)


def without_mark_in_names(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields without byte order marks at the start of their names, as a CSV file's header may have left one."""
    if _MARK not in "".join(fields):
        return fields
    return {without_mark(name): value for name, value in fields.items()}


def check_is_utf8(
    head: bytes, where: str, error: Callable[[str], Exception], *, convert: str = f"{ICONV} FILE > NEW"
) -> None:
    """Raise `error` if a file is UTF-16 or UTF-32, with or without a byte order mark.

    head: its first `HEAD` bytes.
    where: the file, for the error.
    convert: command that converts it. {} stands for the name of its encoding.
    """
    name = _wide_encoding(head)
    if name is not None:
        raise error(f"{where} is {name}, expected UTF-8. Convert it: {convert.format(name)}")


def _wide_encoding(head: bytes) -> str | None:
    """The name, for iconv, of the UTF-16 or UTF-32 of a file that begins with these bytes; None for other encodings."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    if 0 in head:
        is_set = tuple(map(bool, head))
        for name, first_two in _ZEROS_OF_ASCII.items():
            if is_set[: len(first_two)] == first_two:
                return name
    return None


def read_user_stdin(error: type[ArcError]) -> str:
    """Read standard input as `read_user_text` reads a file. The encoding of the terminal does not matter."""
    if sys.stdin is None:  # closed by the caller
        raise error("standard input is closed, so - reads nothing. Give the text itself or the path of a file.")
    return decode_user_text(sys.stdin.buffer.read(), "standard input", error, remedy="Convert the text to UTF-8.")


def check_encodable(text: str, what: str) -> str:
    """The text itself. Raises DataError if UTF-8 cannot encode it.

    Python keeps lone surrogates of JSON ("\\ud83d") and invalid bytes of the command line in its strings.
    """
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as failure:
        raise DataError(
            f"{what} holds characters that UTF-8 cannot encode: {text[failure.start]!r} at character {failure.start}. "
            "Repair the text at its source, or replace them in Python: text.encode('utf-8', 'replace').decode()"
        ) from failure
    return text


def read_user_json(path: Path, error: type[ArcError], *, remedy: str) -> Any:
    """Read a JSON file as `read_user_text` reads a text file. The error names the line of a fault."""
    return parse_user_json(read_user_text(path, error, remedy=remedy), str(path), error, remedy=remedy)


def parse_user_json(text: str, where: str, error: type[ArcError], *, remedy: str) -> Any:
    """Parse JSON text. `where` and `remedy` are parts of the error."""
    with _json_faults(where, error, remedy):
        return json.loads(text)


def parse_user_json_values(text: str, where: str, error: type[ArcError], *, remedy: str) -> Iterator[Any]:
    """Parse the JSON values of a text: one, or many as in JSON lines. `where` and `remedy` are parts of the error."""
    decoder = json.JSONDecoder()
    end = _BETWEEN_VALUES.match(text).end()  # type: ignore[union-attr]  # it matches the empty string
    while end < len(text):
        with _json_faults(where, error, remedy):
            value, end = decoder.raw_decode(text, end)
        yield value
        end = _BETWEEN_VALUES.match(text, end).end()  # type: ignore[union-attr]


@contextmanager
def _json_faults(where: str, error: type[ArcError], remedy: str) -> Iterator[None]:
    try:
        yield
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

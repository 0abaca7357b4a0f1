"""Read small files and texts that users provide. All readers report the same faults, with the same remedies.

A folder that was cloned without Git LFS holds pointers: text files of about 130 bytes in place of large files. Files
that were saved on Windows may begin with a byte order mark, or be UTF-16.
"""

from __future__ import annotations

import codecs
import json
import sys
from pathlib import Path
from typing import Any

from arc_ds.errors import ArcError, DataError

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
    try:
        raw = path.read_bytes()
    except OSError as failure:
        raise error(f"{path} cannot be read: {failure.strerror or failure}. {remedy}") from failure
    check_downloaded(path, error)
    return decode_user_text(raw, str(path), error, remedy=remedy)


def decode_user_text(raw: bytes, where: str, error: type[ArcError], *, remedy: str) -> str:
    """Decode UTF-8 with or without a byte order mark. `where` and `remedy` are parts of the error."""
    if raw.startswith(_UTF16_MARKS):
        raise error(f"{where} is UTF-16, expected UTF-8. Convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        raise error(f"{where} is not UTF-8 ({failure}). {remedy}") from failure


def read_user_stdin(error: type[ArcError]) -> str:
    """Read standard input as `read_user_text` reads a file, whatever the encoding of the terminal."""
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
    try:
        return json.loads(text)
    except json.JSONDecodeError as failure:
        raise error(f"{where}:{failure.lineno}: not valid JSON: {failure.msg}. {remedy}") from failure
    except (ValueError, RecursionError) as failure:  # numbers of thousands of digits; objects nested too deeply
        raise error(f"{where}: not valid JSON: {failure}. {remedy}") from failure

"""Shard addresses: recognizing, joining and displaying URLs. Nothing is opened here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

from arc_ds.errors import DataError

_PIPE = "pipe:"
_URL = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://")
_FILE = re.compile(r"file:", re.IGNORECASE)
_SECRETS = re.compile(r"//.*@|\?.*")


def is_url(path: str | Path) -> bool:
    """Whether a path must be fetched. False for `file:///…`, which is a local path written as a URL.

    Raises DataError on a malformed URL, such as one with an unmatched bracket.
    """
    return _URL.match(str(path)) is not None and _split(path).scheme != "file"


def local_path(path: str | Path) -> Path:
    """The local path; converts `file:///…` to a plain path."""
    return Path(unquote(_split(path).path)) if _FILE.match(str(path)) else Path(path)


def join_url(base: str, name: str) -> str:
    """The URL of the file `name` in the folder `base`.

    In a `pipe:` command the shell-quoted name replaces every {}. If there is no {}, a slash and the name are appended
    to the command. The query of a signed URL stays after the name.
    """
    if base.startswith(_PIPE):
        word = shlex.quote(name)
        return base.replace("{}", word) if "{}" in base else f"{base.rstrip('/')}/{word}"
    parts = _split(base)
    word = quote(name) if parts.scheme in ("http", "https") else name
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{word}"))


def shown_url(url: str | Path) -> str:
    """The URL for messages, without password and query because they may contain secrets. Paths are unchanged."""
    if not is_url(url) or str(url).startswith(_PIPE):
        return str(url)
    parts = _split(url)
    user, at, host = parts.netloc.rpartition("@")
    netloc = f"{user.partition(':')[0]}:…@{host}" if at and ":" in user else parts.netloc
    return urlunsplit(parts._replace(netloc=netloc, query="…" if parts.query else ""))


def _split(url: str | Path) -> SplitResult:
    try:
        return urlsplit(str(url))
    except ValueError as error:
        shown = _SECRETS.sub("…", str(url))
        raise DataError(f"{shown} is not a valid URL ({error}). Correct the address.") from error

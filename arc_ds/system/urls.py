"""Shard addresses: recognizing, joining and displaying URLs. Nothing is opened here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

from arc_ds.errors import DataError

_PIPE = "pipe:"
_URL = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]*://")
_FILE = re.compile(r"file:(//(?P<host>[^/]*))?(?P<place>.*)", re.IGNORECASE | re.DOTALL)
_WEB = re.compile(r"https?://", re.IGNORECASE)
_LONE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_SECRETS = re.compile(r"//.*@|\?.*")


def is_url(path: str | Path) -> bool:
    """Whether a path must be fetched. False for `file:///…`, which is a local path written as a URL.

    Raises DataError on a malformed URL, such as one with an unmatched bracket.
    """
    return _URL.match(str(path)) is not None and _split(path).scheme != "file"


def local_path(path: str | Path) -> Path:
    """The local path; converts `file:///…` to a plain path. ? and # are part of the path, quoted or not.

    Raises DataError if a file: URL names a host.
    """
    if not (match := _FILE.match(str(path))):
        return Path(path)
    host, place = match["host"] or "", match["place"]
    if host.lower() not in ("", "localhost"):
        raise DataError(f"{path} names the host {host}. A local path has three slashes: file:///{host}{place}.")
    return Path(unquote(place))


def join_url(base: str, name: str) -> str:
    """The URL of the file `name` in the folder `base`.

    In a `pipe:` command the shell-quoted name replaces every {}. If there is no {}, a slash and the name are appended
    to the command. The query of a signed URL stays after the name. The names of other stores are not quoted.
    """
    if base.startswith(_PIPE):
        word = shlex.quote(name)
        return base.replace("{}", word) if "{}" in base else f"{base.rstrip('/')}/{word}"
    if not _is_web(base):
        return f"{base.rstrip('/')}/{name}"
    parts = _split(web_url(base))
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


def api_base(url: str) -> str:
    """The address to which the paths of OpenAI's API are appended. The given one may lack /v1."""
    return f"{url.rstrip('/').removesuffix('/v1')}/v1"


def name_in_url(url: str) -> str:
    """The last part of a URL's path."""
    path = unquote(_split(web_url(url)).path) if _is_web(url) else url
    return path.rstrip("/").rpartition("/")[2]


def web_url(url: str) -> str:
    """The URL in the form of a request: spaces, non-ASCII, # and a lone % are quoted; existing quotes stay.

    Only http(s) URLs change: the other stores take names as they are.
    """
    return quote(_LONE_PERCENT.sub("%25", url), safe=":/?[]@!$&'()*+,;=%~") if _is_web(url) else url


def shown_url(url: str | Path) -> str:
    """The URL for messages, without password and query because they may contain secrets. Paths are unchanged."""
    if not is_url(url) or str(url).startswith(_PIPE):
        return str(url)
    parts = _split(url)
    user, at, host = parts.netloc.rpartition("@")
    netloc = f"{user.partition(':')[0]}:…@{host}" if at and ":" in user else parts.netloc
    return urlunsplit(parts._replace(netloc=netloc, query="…" if parts.query else ""))


def _is_web(url: str) -> bool:
    return _WEB.match(url) is not None


def _split(url: str | Path) -> SplitResult:
    try:
        return urlsplit(str(url))
    except ValueError as error:
        shown = _SECRETS.sub("…", str(url))
        raise DataError(f"{shown} is not a valid URL ({error}). Correct the address.") from error

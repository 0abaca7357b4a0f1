"""Fetching what a URL holds: http(s) by the standard library, all else by webdataset's `gopen`, with retries.

http(s) does not go through `gopen`, whose `curl` retries silently for minutes and tells a wrong address from a busy
server by no word.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import itertools
import logging
import os
import random
import re
import select
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import IO, Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit, urlunsplit

from arc_ds.errors import StorageError
from arc_ds.system.urls import shown_url

logger = logging.getLogger(__name__)

_PIECE = 1 << 20
_SLOWEST = 10_000  # bytes/s over a whole transfer; below, it is broken off like one that stands still
_TRANSIENT_4XX = (408, 425, 429)
_ABSENT_HTTP = (403, 404, 410)
_NOT_FOUND = 127  # a shell's exit code where there is no such command
# How the `aws` command words a server's answer; those that another attempt would get again.
_S3_ANSWER = re.compile(r"An error occurred \((\w+)\)")
_ABSENT_S3 = ("403", "404", "AccessDenied", "NoSuchKey", "NoSuchBucket")
_FINAL_S3 = (*_ABSENT_S3, "ExpiredToken", "InvalidAccessKeyId", "InvalidBucketName", "SignatureDoesNotMatch")
_T = TypeVar("_T")
_failures = itertools.count(1)


class TransferError(Exception):
    """One attempt to read a URL failed. is_final: another attempt would fail alike.

    is_absent: the server knows of no such file (some answer 403 to who may not ask what there is).
    """

    def __init__(self, message: str, *, is_final: bool = False, is_absent: bool = False) -> None:
        super().__init__(message)
        self.is_final = is_final
        self.is_absent = is_absent


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """How often a transfer is tried. The wait doubles after each failure. timeout_s: without a byte."""

    attempts: int = 6
    first_wait_s: float = 1.0
    timeout_s: float = 60.0


def with_retries(url: str, attempt: Callable[[], _T], retries: Retries) -> _T:
    """What `attempt` returns, tried again while it raises TransferErrors that are not final.

    Each failure is a warning that counts those of this process. StorageError, with the last reason, at the end.
    """
    for number in range(1, retries.attempts + 1):
        try:
            return attempt()
        except TransferError as error:
            if error.is_final or number == retries.attempts:
                tried = "once" if number == 1 else f"{number} times"
                raise StorageError(
                    f"{shown_url(url)} cannot be fetched, tried {tried}: {error}. Check the address, the rights to it "
                    "and its server from this host, then start again: a run goes on where it stopped."
                ) from error
            # hosts that failed together shall not come back together
            wait_s = retries.first_wait_s * 2 ** (number - 1) * random.uniform(0.75, 1.25)
            logger.warning(
                "%s: attempt %d of %d failed (%s); the next in %.1f s (failed transfers in this process: %d)",
                shown_url(url), number, retries.attempts, error, wait_s, next(_failures),
            )  # fmt: skip
            time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


def fetch_bytes(url: str, *, max_bytes: int, retries: Retries, sha256: str | None = None) -> bytes:
    """All that a URL holds, for small files; StorageError where it cannot be had, is longer, or has another sum."""

    def attempt() -> bytes:
        pieces, total = [], 0
        for piece in read_pieces(url, retries.timeout_s):
            total += len(piece)
            if total > max_bytes:
                raise TransferError(f"it is longer than the expected {max_bytes} bytes", is_final=True)
            pieces.append(piece)
        data = b"".join(pieces)
        if sha256 is not None:
            _check_digest(hashlib.sha256(data).hexdigest(), sha256)
        return data

    return with_retries(url, attempt, retries)


def download(
    url: str, file: IO[bytes], *, timeout_s: float, num_bytes: int | None = None, sha256: str | None = None
) -> None:
    """One attempt to write what a URL holds to the beginning of an open file and on to the disk.

    TransferError where it cannot be had, or is not `num_bytes` long or of this sum (None: unknown); OSError where it
    cannot be written.
    """
    digest = hashlib.sha256()
    total = 0
    file.seek(0)
    for piece in read_pieces(url, timeout_s):
        total += len(piece)
        if num_bytes is not None and total > num_bytes:
            raise TransferError(f"it is longer than the manifest's {num_bytes} bytes: another file lies there")
        digest.update(piece)
        file.write(piece)
    if num_bytes is not None and total != num_bytes:
        raise TransferError(f"it ended after {total} of {num_bytes} bytes")
    if sha256 is not None:
        _check_digest(digest.hexdigest(), sha256)
    file.truncate(total)
    file.flush()
    os.fsync(file.fileno())


def _check_digest(found: str, expected: str) -> None:
    if found != expected:
        raise TransferError(f"its sha256 is {found[:16]}…, the manifest's {expected[:16]}…: damaged, or another file")


def read_pieces(url: str, timeout_s: float) -> Iterator[bytes]:
    """Yields what a URL holds, once. TransferError where it cannot be read, stands still or hardly moves."""
    try:
        url = _rewritten(url)
        read = _read_http if urlsplit(url).scheme in ("http", "https") else _read_gopen
        begin, total = time.monotonic(), 0
        for piece in read(url, timeout_s):
            total += len(piece)
            taken_s = time.monotonic() - begin
            if taken_s > timeout_s and total < _SLOWEST * taken_s:
                raise TransferError(f"only {total} bytes came in {taken_s:.0f} s")
            yield piece
    except HTTPError as error:
        is_final = 400 <= error.code < 500 and error.code not in _TRANSIENT_4XX
        is_absent = error.code in _ABSENT_HTTP
        words = f"the server answered {error.code} {error.reason}"
        raise TransferError(words, is_final=is_final, is_absent=is_absent) from error
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = error.reason if isinstance(error, URLError) else error
        raise TransferError(f"{type(error).__name__}: {reason}") from error


def _rewritten(url: str) -> str:
    """The URL as stock readers rewrite it where GOPEN_REWRITE says so. webdataset takes seconds to import."""
    if "GOPEN_REWRITE" not in os.environ:
        return url
    from webdataset.gopen import rewrite_url

    return rewrite_url(url)


def _read_http(url: str, timeout_s: float) -> Iterator[bytes]:
    with urllib.request.urlopen(_request(url), timeout=timeout_s) as response:
        expected = response.headers.get("Content-Length")
        total = 0
        while piece := response.read1(_PIECE):
            total += len(piece)
            yield piece
        if expected is not None and total != int(expected):  # urllib says nothing when a body is cut short
            raise TransferError(f"the server broke off after {total} of {expected} bytes")


def _request(url: str) -> urllib.request.Request:
    """The request, with a user and password of the URL in its header."""
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=host)), headers={"User-Agent": "arc-ds"})
    if user:
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(unquote(user).encode()).decode())
    return request


def _read_gopen(url: str, timeout_s: float) -> Iterator[bytes]:
    """Through webdataset; s3://, which it does not know, by the `aws` command."""
    from webdataset.gopen import Pipe, gopen, gopen_schemes

    if urlsplit(url).scheme == "s3" and "s3" not in gopen_schemes:
        yield from _read_s3(url, timeout_s)
        return
    try:
        stream: Any = gopen(url)
    except ValueError as error:
        raise TransferError(f"webdataset cannot open such an address ({error})", is_final=True) from error
    except FileNotFoundError as error:
        raise TransferError(f"the program that opens it is not installed ({error.filename})", is_final=True) from error
    if isinstance(stream, Pipe):
        yield from _read_pipe(stream, timeout_s)
        return
    with stream:
        while piece := stream.read(_PIECE):
            yield piece


def _read_s3(url: str, timeout_s: float) -> Iterator[bytes]:
    command = ["aws", "s3", "cp", "--only-show-errors", url, "-"]
    with TemporaryFile() as said:
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said)
        except FileNotFoundError as error:
            raise TransferError("the `aws` command (package awscli) is not installed", is_final=True) from error
        assert process.stdout is not None, "it is a pipe"
        with process:
            try:
                yield from _read_descriptor(process.stdout.fileno(), timeout_s)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            said.seek(0)
            words = " ".join(said.read().decode(errors="replace").split()) or f"exit code {process.returncode}"
            found = _S3_ANSWER.search(words)
            answer = found.group(1) if found else ""
            raise TransferError(words, is_final=answer in _FINAL_S3, is_absent=answer in _ABSENT_S3)


def _read_pipe(stream: Any, timeout_s: float) -> Iterator[bytes]:
    """What a command writes. One that is still running when its output is no longer wanted is killed."""
    is_whole = False
    try:
        yield from _read_descriptor(stream.stream.fileno(), timeout_s)
        is_whole = True
    finally:
        if not is_whole:
            stream.ignore_errors = True  # the reason is on its way already
            stream.proc.kill()
        try:
            stream.close()
        except OSError as error:
            is_missing = stream.status == _NOT_FOUND
            words = f"its command failed (exit code {stream.status}){': is it installed?' if is_missing else ''}"
            raise TransferError(words, is_final=is_missing) from error


def _read_descriptor(descriptor: int, timeout_s: float) -> Iterator[bytes]:
    """What comes through a pipe to its end; TransferError where nothing comes for `timeout_s`."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while poll.poll(timeout_s * 1000):
        if not (piece := os.read(descriptor, _PIECE)):
            return
        yield piece
    raise TransferError(f"nothing came for {timeout_s:.0f} s")

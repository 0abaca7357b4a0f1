"""Fetch files from URLs with retries: `pipe:` commands as webdataset runs them, every other protocol by fsspec.

An error's type, errno or HTTP status decides whether another attempt may help.
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import logging
import os
import random
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from arc_ds.errors import StorageError
from arc_ds.system.urls import shown_url, web_url
from arc_ds.system.user_files import is_lfs_pointer

logger = logging.getLogger(__name__)

_PIECE = 1 << 20
_BLOCK = 16 << 20  # bytes of one request, if a protocol reads a file in several
_SLOWEST = 10_000  # bytes/s over a whole transfer; a slower one is aborted like a stalled one
_NOT_FOUND = 127  # a shell's exit code if there is no such command
_PIPE_CLOSED = 141  # a shell's exit code if a part of the command wrote on after its reader had ended
_TRANSIENT_4XX = (408, 425, 429)
_ABSENT_HTTP = (403, 404, 410)
_FINAL_ERRNOS = (errno.EINVAL, errno.EISDIR)  # s3fs raises the first for a server's "bad request"
_STREAMS = ("http", "https", "hf")  # read by one request
# fsspec has more protocols, and some read local files, which a foreign manifest must not name.
_PROTOCOLS = ("http", "https", "s3", "gs", "hf", "abfs", "sftp")
_T = TypeVar("_T")
_failures = itertools.count(1)


class TransferError(Exception):
    """One attempt to read a URL failed.

    is_final: another attempt would fail in the same way.
    is_absent: the server has no such file. Some servers answer 403 instead of 404 to clients that may not list files.
    """

    def __init__(self, message: str, *, is_final: bool = False, is_absent: bool = False) -> None:
        super().__init__(message)
        self.is_final = is_final
        self.is_absent = is_absent


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """How often a transfer is tried. The wait doubles after each failure.

    attempts: number of attempts.
    first_wait_s: seconds before the second attempt.
    timeout_s: seconds without a byte until an attempt fails.
    """

    attempts: int = 6
    first_wait_s: float = 1.0
    timeout_s: float = 60.0


def _with_retries(url: str, attempt: Callable[[], _T], retries: Retries) -> _T:
    """Return the result of `attempt`; try again if it raises a TransferError that is not final.

    Each failure logs a warning with this process's number of failures. Raises StorageError with the last reason.
    """
    for number in range(1, retries.attempts + 1):
        try:
            return attempt()
        except TransferError as error:
            if error.is_final or number == retries.attempts:
                tried = "once" if number == 1 else f"{number} times"
                raise StorageError(
                    f"{shown_url(url)} cannot be fetched, tried {tried}: {error}. Check the address, the rights to it "
                    "and its server from this host, then start again: a run continues where it stopped."
                ) from error
            # hosts that failed together must not retry together
            wait_s = retries.first_wait_s * 2 ** (number - 1) * random.uniform(0.75, 1.25)
            logger.warning(
                "%s: attempt %d of %d failed (%s); the next in %.1f s (failed transfers in this process: %d)",
                shown_url(url), number, retries.attempts, error, wait_s, next(_failures),
            )  # fmt: skip
            time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


def fetch_bytes(url: str, *, max_bytes: int, retries: Retries, sha256: str | None = None) -> bytes:
    """Return a small file's content. Raises StorageError if it is unreachable, too long, or has another sha256."""

    def attempt() -> bytes:
        content = io.BytesIO()
        _transfer(url, content, retries.timeout_s, max_bytes=max_bytes, sha256=sha256)
        return content.getvalue()

    return _with_retries(url, attempt, retries)


def download(
    url: str, file: IO[bytes], *, retries: Retries, num_bytes: int | None = None, sha256: str | None = None
) -> None:
    """Write a URL's content to an open file, and sync it to the disk.

    num_bytes: expected size, None if unknown.
    sha256: expected checksum, None if unknown.

    Raises StorageError if the URL is unreachable or its content is not as expected, OSError if it cannot be written.
    """

    def attempt() -> None:
        file.seek(0)
        _transfer(url, file, retries.timeout_s, num_bytes=num_bytes, sha256=sha256)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())

    _with_retries(url, attempt, retries)


def _transfer(
    url: str,
    file: IO[bytes],
    timeout_s: float,
    *,
    num_bytes: int | None = None,
    max_bytes: int | None = None,
    sha256: str | None,
) -> None:
    """Write a URL's content to an open file in one attempt. Raises TransferError if it is not as expected."""
    digest, total = hashlib.sha256(), 0
    limit = max_bytes if num_bytes is None else num_bytes
    for piece in _read_pieces(url, timeout_s):
        if not total and is_lfs_pointer(piece):
            words = "it is a pointer of Git LFS (on the Hugging Face Hub, /resolve/ serves the file, /raw/ its pointer)"
            raise TransferError(words, is_final=True)
        total += len(piece)
        if limit is not None and total > limit:
            words = f"it is longer than the expected {limit} bytes: it is another file"
            raise TransferError(words, is_final=num_bytes is None)
        digest.update(piece)
        file.write(piece)
    if num_bytes is not None and total < num_bytes:
        raise TransferError(f"it ended after {total} of {num_bytes} bytes")
    if sha256 is not None and (found := digest.hexdigest()) != sha256:
        raise TransferError(f"its sha256 is {found[:16]}…, the manifest's {sha256[:16]}…: damaged, or another file")


def _read_pieces(url: str, timeout_s: float) -> Iterator[bytes]:
    """Yield a URL's content once. Raises TransferError if it is unreachable, or the transfer stalls or is too slow."""
    if "GOPEN_REWRITE" in os.environ:  # webdataset's variable; importing webdataset takes seconds
        from webdataset.gopen import rewrite_url

        url = rewrite_url(url)
    begin, total = time.monotonic(), 0
    for piece in (_read_command if url.startswith("pipe:") else _read_file)(url, timeout_s):
        total += len(piece)
        taken_s = time.monotonic() - begin
        if taken_s > timeout_s and total < _SLOWEST * taken_s:
            raise TransferError(f"only {total} bytes came in {taken_s:.0f} s")
        yield piece


def _read_file(url: str, timeout_s: float) -> Iterator[bytes]:
    """Yield the content of a file that fsspec can open."""
    url = web_url(url)
    try:
        system = _file_system(url, timeout_s)
        # A stream needs no true size. Without one, fsspec would request it and report any error as a missing file.
        is_stream = urlsplit(url).scheme in _STREAMS
        options = {"block_size": 0, "size": 1} if is_stream else {"block_size": _BLOCK}
        with system.open(url, **options) as file:
            if hasattr(file, "prefetch"):  # paramiko, which otherwise waits for each 32 KiB
                file.prefetch()
            while piece := file.read(_PIECE):
                yield piece
    except TransferError:
        raise
    except Exception as error:  # the packages' errors share no base class
        raise _transfer_error(error, url, timeout_s) from None  # its message may contain the URL's password


def _file_system(url: str, timeout_s: float) -> Any:
    """Return fsspec's file system for a URL. Timeouts are the package's own (s3fs: 15 s), except for http and sftp."""
    import fsspec

    protocol = urlsplit(url).scheme
    if protocol not in _PROTOCOLS:
        raise TransferError(f"expected {'://, '.join(_PROTOCOLS)}:// or pipe:COMMAND", is_final=True)
    try:
        kind = fsspec.get_filesystem_class(protocol)
    except ImportError as error:  # fsspec's message names the package
        words = f"{protocol}:// needs a package that is not installed ({error}). Run pip install '.[remote]'"
        raise TransferError(words, is_final=True) from None
    place = kind._get_kwargs_from_urls(url)
    if kind.async_impl:
        return _async_file_system(kind, timeout_s, os.getpid(), **place)
    system = kind(**place, skip_instance_cache=True)  # a cached one may have lost its connection
    if protocol == "sftp":
        system.ftp.get_channel().settimeout(timeout_s)
    return system


@cache
def _async_file_system(kind: Any, timeout_s: float, _process: int, **place: str) -> Any:
    """Return this process's file system of a kind.

    It is never freed: fsspec would then close its sessions, even in a forked child, whose event loop is the parent's.
    """
    if "http" not in kind.protocol:
        return kind(**place)
    from aiohttp import ClientTimeout

    timeout = ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
    headers = {"User-Agent": "arc-ds", "Accept-Encoding": "identity"}
    # trust_env: use proxies. encoded: send the URL unchanged, because it may be signed.
    return kind(encoded=True, client_kwargs={"timeout": timeout, "headers": headers, "trust_env": True})


def _transfer_error(error: Exception, url: str, timeout_s: float) -> TransferError:
    """Convert an error of fsspec or of a protocol's package."""
    from fsspec.exceptions import FSTimeoutError

    response = getattr(error, "response", None)
    status = (  # of errors by aiohttp, huggingface_hub and gcsfs
        getattr(error, "status", None) or getattr(response, "status_code", None) or getattr(error, "code", None)
    )
    status = status if isinstance(status, int) else 0
    is_absent = isinstance(error, FileNotFoundError | PermissionError) or status in _ABSENT_HTTP
    is_final = is_absent or isinstance(error, ValueError) or getattr(error, "errno", None) in _FINAL_ERRNOS
    is_final |= 400 <= status < 500 and status not in _TRANSIENT_4XX
    if isinstance(error, FileNotFoundError):
        words = "there is no such file"
    elif status:  # the error's own message contains the URL
        words = f"the server answered {status} {getattr(error, 'message', '')}"
    elif isinstance(error, TimeoutError | FSTimeoutError):
        words = f"nothing came for {timeout_s:.0f} s"
    else:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        for secret in filter(None, (urlsplit(url).query, urlsplit(url).password)):
            words = words.replace(secret, "…")
    return TransferError(words, is_final=is_final, is_absent=is_absent)


def _read_command(url: str, timeout_s: float) -> Iterator[bytes]:
    """Yield the output of a `pipe:` command. Kill it and its children if its output is no longer needed."""
    words = url.removeprefix("pipe:")
    with subprocess.Popen(words, shell=True, stdout=subprocess.PIPE, start_new_session=True) as command:
        assert command.stdout is not None, "the output is a pipe"
        descriptor, poll = command.stdout.fileno(), select.poll()
        poll.register(descriptor, select.POLLIN)
        try:
            while True:
                if not poll.poll(timeout_s * 1000):
                    raise TransferError(f"nothing came for {timeout_s:.0f} s")
                if not (piece := os.read(descriptor, _PIECE)):
                    break
                yield piece
        except BaseException:
            os.killpg(command.pid, signal.SIGKILL)
            raise
    if command.returncode not in (0, _PIPE_CLOSED):
        is_missing = command.returncode == _NOT_FOUND
        words = f"its command failed (exit code {command.returncode}){': is it installed?' if is_missing else ''}"
        raise TransferError(words, is_final=is_missing)

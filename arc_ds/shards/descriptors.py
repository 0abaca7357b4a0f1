"""The limit on open file descriptors (often only 1024 per process), and the error raised when none is left."""

from __future__ import annotations

import errno
import logging
import resource
from contextlib import suppress
from functools import cache

from arc_ds.errors import StorageError

logger = logging.getLogger(__name__)

_MAX_LIMIT = 65536  # more does not help, and a child that closes every possible descriptor would take minutes


def descriptor_limit() -> int:
    """The number of files that this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_LIMIT if soft == resource.RLIM_INFINITY else soft


def raise_descriptor_limit() -> None:
    """Raise the descriptor limit of this process and its children to the hard limit, at most 65536.

    If the system forbids that, the limit stays unchanged.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = _MAX_LIMIT if hard == resource.RLIM_INFINITY else min(hard, _MAX_LIMIT)
    if descriptor_limit() < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def descriptor_shortage(error: BaseException | None) -> OSError | None:
    """Find "too many open files" (EMFILE) among an error and its causes; None if it is not there.

    Such an error says nothing about the file that could not be opened.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.EMFILE:
            return error
        error = error.__cause__ or error.__context__
    return None


def no_descriptor_error(shortage: OSError) -> StorageError:
    """The error to raise if the process has no descriptor left and no shard is mapped."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return StorageError(
        f"{shortage.filename or 'A shard'} cannot be opened: this process has reached its limit of {soft} open "
        f"files, and none of them is a shard. Raise the limit (for example ulimit -n {max(4 * soft, 4096)}; up to "
        f"{hard} without administrator rights) and start again: a run resumes where it stopped."
    )


@cache
def warn_of_shortage() -> None:
    """Warn once per process that it continues, but slower: every later shortage would repeat the message."""
    logger.warning(
        "this process has reached its limit of %d open files and closed mapped shards to continue. Raise the limit "
        "(ulimit -n).",
        descriptor_limit(),
    )

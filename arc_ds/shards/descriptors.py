"""File descriptors, of which a process may have as few as 1024: their limit, and the error if none is left."""

from __future__ import annotations

import errno
import logging
import resource
from contextlib import suppress
from functools import cache

from arc_ds.errors import StorageError

logger = logging.getLogger(__name__)

_MAX_LIMIT = 65536  # more is of no use, and programs that close every descriptor there may be would take minutes


def descriptor_limit() -> int:
    """How many files this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_LIMIT if soft == resource.RLIM_INFINITY else soft


def raise_descriptor_limit() -> None:
    """Raise that number, for this process and its children, to what the system allows, at most 65536.

    If the system forbids that, all stays as it was.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = _MAX_LIMIT if hard == resource.RLIM_INFINITY else min(hard, _MAX_LIMIT)
    if descriptor_limit() < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def descriptor_shortage(error: BaseException | None) -> OSError | None:
    """The error among this one and its causes that says that too many files are open, None if none does.

    Such an error says nothing about the file that was to be opened.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.EMFILE:
            return error
        error = error.__cause__ or error.__context__
    return None


def no_descriptor_error(shortage: OSError) -> StorageError:
    """The error to raise if all descriptors are taken, none of them by shards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return StorageError(
        f"{shortage.filename or 'A shard'} cannot be opened: all {soft} files that this process may have open are "
        f"taken, none of them by shards. Raise the limit (as by ulimit -n {max(4 * soft, 4096)}; without an "
        f"administrator up to {hard}) and start again: a run goes on where it stopped."
    )


@cache
def warn_of_shortage() -> None:
    """Warn once a process that it goes on, slower: others in it will meet the same."""
    logger.warning(
        "%d files are open, which is all that this process may have: mapped shards were closed to go on. Raise the "
        "limit (ulimit -n).",
        descriptor_limit(),
    )

"""Errors for users, one class per kind of problem.

Every message states the expected value, the actual value, the place and the remedy. Code that detects a user's mistake
raises one of these errors. An `assert` is only for invariants of our own code.
"""

from __future__ import annotations

import re

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # torch writes them into its messages


def words_of(error: BaseException) -> str:
    """The whole message of another tool's error, in one line: its remedy often stands at its end."""
    return " ".join(_COLOURS.sub("", str(error)).split()) or type(error).__name__


class ArcError(Exception):
    """Base class of all errors that ARC-DS raises on purpose. The command line prints them without a traceback.

    is_of_all_ranks: whether every rank of the run raises this error with the same words.
    """

    is_of_all_ranks = False


class ConfigError(ArcError):
    """Invalid config file or override: unknown key, wrong type, value out of range."""


class WeightsError(ArcError):
    """Unreadable weights folder: missing file, missing tensor, wrong tensor shape, unknown format."""


class UnknownFamilyError(WeightsError):
    """Weights of a family that our own transformer does not compute."""


class TokenizerError(ArcError):
    """A tokenizer that cannot be read or does not match its weights."""


class DataError(ArcError):
    """Invalid shards, records or samples: damaged tar, missing field, empty text."""


class StorageError(ArcError):
    """Unreachable files: a server that does not answer, a full disk, a deleted shard.

    This is not a data error, so `data.on_error: skip` does not skip it: a temporary outage must not change the data
    that a run reads.
    """


class DiskFullError(StorageError):
    """A write that failed because the disk, the quota or the file size limit is exhausted."""


class ServerError(ArcError):
    """A server that runs a decoder and does not answer, or refuses a request."""


class CheckpointError(ArcError):
    """A checkpoint that cannot be written or read: incomplete, corrupted, or from another run."""


class TrainingError(ArcError):
    """A run that cannot continue: too many non-finite steps, or a world size that does not divide the batch."""


class LostRankError(TrainingError):
    """A rank or a host that no longer answers: killed, frozen, or cut off from the network."""


class StalledError(TrainingError):
    """A step that takes longer than `stall_limit_s` although all ranks answer."""


class OutOfMemoryError(TrainingError):
    """A step that needs more memory than the device or the host has."""


class NonFiniteError(TrainingError):
    """Too many steps in a row with a non-finite loss or gradient."""

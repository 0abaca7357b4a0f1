"""The errors a user can meet, one class for each thing that can be wrong.

Every message says what was expected, what came, where, and the cure. Code that finds a user's mistake
raises one of these; an `assert` is for what our own code guarantees.
"""

from __future__ import annotations


class ArcError(Exception):
    """Base of all errors that ARC-DS raises on purpose; the command line prints them without a traceback."""


class ConfigError(ArcError):
    """A config file or override that cannot be used: unknown key, wrong type, value out of range."""


class WeightsError(ArcError):
    """A weights folder that cannot be read: missing file, missing or misshapen tensor, unknown format."""


class TokenizerError(ArcError):
    """A tokenizer that cannot be read or does not fit the weights it comes with."""


class DataError(ArcError):
    """Shards, records or samples that cannot be used: damaged tar, missing field, empty text."""


class StorageError(ArcError):
    """Files that cannot be reached: a server that does not answer, a full disk, a shard that is gone.

    No error of the data, so `data.on_error: skip` does not pass over it: what a run reads must not depend on weather.
    """


class CheckpointError(ArcError):
    """A checkpoint that cannot be written or read: torn, corrupted, or of another run."""


class TrainingError(ArcError):
    """A run that cannot go on: too many non-finite steps, a world size that does not divide the batch."""

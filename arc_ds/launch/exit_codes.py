"""Exit codes of a run, for schedulers and scripts. Imports little, because each rank starts with it."""

from __future__ import annotations

from collections.abc import Sequence

from arc_ds.errors import (
    ArcError,
    DataError,
    DiskFullError,
    LostRankError,
    NonFiniteError,
    OutOfMemoryError,
    StalledError,
    StorageError,
    TrainingError,
)

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_DATA = 3
EXIT_LOST_RANK = 4
EXIT_STALLED = 5
EXIT_OUT_OF_MEMORY = 6
EXIT_NON_FINITE = 7
EXIT_DISK_FULL = 8
# EX_TEMPFAIL of sysexits.h, "try again later". It is not 128 + n, the code of a process killed by a signal.
EXIT_PREEMPTED = 75

# The first class that fits decides, so subclasses come before their bases.
_CODES: tuple[tuple[type[ArcError], int], ...] = (
    (DiskFullError, EXIT_DISK_FULL),
    (DataError, EXIT_DATA),
    (StorageError, EXIT_DATA),
    (LostRankError, EXIT_LOST_RANK),
    (StalledError, EXIT_STALLED),
    (OutOfMemoryError, EXIT_OUT_OF_MEMORY),
    (NonFiniteError, EXIT_NON_FINITE),
    (TrainingError, EXIT_FAILED),
)


def exit_code_of(error: ArcError) -> int:
    """The code of an error's kind. EXIT_USER_ERROR if a user must fix something that no other code names."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), EXIT_USER_ERROR)


def joint_exit_code(codes: Sequence[int]) -> int:
    """The exit code of a run from those of its ranks or hosts."""
    failures = [code for code in codes if code not in (EXIT_OK, EXIT_PREEMPTED)]
    if failures:
        # The others saw a lost rank if one failed for another reason.
        return next((code for code in failures if code != EXIT_LOST_RANK), EXIT_LOST_RANK)
    return EXIT_PREEMPTED if EXIT_PREEMPTED in codes else EXIT_OK

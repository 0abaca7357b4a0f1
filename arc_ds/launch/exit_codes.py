"""Exit codes of a run, for schedulers and scripts. Avoids large imports because the launch wrapper uses it."""

from __future__ import annotations

from arc_ds.errors import ArcError, TrainingError

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
# EX_TEMPFAIL of sysexits.h, "try again later". It is not 128 + n, the code of a process killed by a signal.
EXIT_PREEMPTED = 75


def exit_code_of(error: ArcError) -> int:
    """EXIT_FAILED if a run failed during training; EXIT_USER_ERROR if a user must fix something before it can start."""
    return EXIT_FAILED if isinstance(error, TrainingError) else EXIT_USER_ERROR

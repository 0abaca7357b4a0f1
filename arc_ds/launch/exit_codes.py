"""The exit codes of a run, for schedulers and scripts. Imports nothing large: the launch wrapper stays light."""

from __future__ import annotations

from arc_ds.errors import ArcError, TrainingError

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
# EX_TEMPFAIL of sysexits.h, "try again later"; not 128 + n, so that it cannot be taken for a death by signal.
EXIT_PREEMPTED = 75


def exit_code_of(error: ArcError) -> int:
    """EXIT_USER_ERROR for what a person has to mend before a start can work; EXIT_FAILED where a run went wrong."""
    return EXIT_FAILED if isinstance(error, TrainingError) else EXIT_USER_ERROR

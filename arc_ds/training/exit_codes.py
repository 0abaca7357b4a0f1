"""The exit codes of a run, for schedulers and scripts. Imports nothing, so that the launch wrapper stays light."""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
# EX_TEMPFAIL of sysexits.h, "try again later"; not 128 + n, so that it cannot be taken for a death by signal.
EXIT_PREEMPTED = 75

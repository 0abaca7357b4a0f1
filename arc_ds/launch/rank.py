"""One rank under the wrapper: `python -m arc_ds.launch.rank MODULE ARGUMENTS...` runs `MODULE.main(arguments)`.

It adds three things to `deepspeed.launcher`. A rank saves and stops when its launcher ends. It defers stop signals
until training can handle them. It writes its actual exit code to a file because the launcher can return 0 after a rank
was killed.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

from arc_ds.launch.exit_codes import EXIT_OK, EXIT_PREEMPTED
from arc_ds.launch.parents import stop_with_launchers
from arc_ds.launch.signals import hold_stop_signals
from arc_ds.launch.status import exit_at_once, write_status

WRAPPER_PID_VARIABLE = "ARC_DS_WRAPPER_PID"


def main(argv: list[str]) -> int:
    """Run `argv[0].main(argv[1:])` as the rank given by the environment; its return value is the exit code."""
    hold_stop_signals()
    stop_with_launchers([int(os.environ[WRAPPER_PID_VARIABLE])])
    write_status()
    code, message = _run(argv[0], argv[1:])
    write_status(code, message)
    # Report an intended stop as success: on any other code the launcher would kill ranks that are still closing.
    return EXIT_OK if code == EXIT_PREEMPTED else code


def _run(module: str, arguments: list[str]) -> tuple[int, str | None]:
    try:
        return int(import_module(module).main(arguments)), None
    except BaseException as error:
        # It imports torch, which must not delay the two calls above.
        from arc_ds.launch.failures import report

        return report(error)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.exit(code) if code == EXIT_OK else exit_at_once(code)

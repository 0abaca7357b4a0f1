"""One rank's life under the wrapper: `python -m arc_ds.launch.rank MODULE ARGUMENTS...` runs `MODULE.main(arguments)`.

What `deepspeed.launcher` does not do (design 8.12): a rank ends with its launcher, waits with a stop signal until the
training can obey it, and leaves its true exit code in a file, since the launcher's own can be 0 after a death.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

from arc_ds.errors import ArcError
from arc_ds.launch.exit_codes import EXIT_FAILED, EXIT_OK, EXIT_PREEMPTED, exit_code_of
from arc_ds.launch.signals import die_with_parent, hold_stop_signals
from arc_ds.system.files import write_whole

STATUS_FOLDER_VARIABLE = "ARC_DS_STATUS_FOLDER"
WRAPPER_PID_VARIABLE = "ARC_DS_WRAPPER_PID"


@dataclass(frozen=True, kw_only=True)
class RankStatus:
    """What a rank says about itself. exit_code is None while it runs; message: a user's mistake in words."""

    pid: int
    exit_code: int | None = None
    message: str | None = None


def main(argv: list[str]) -> int:
    """Run `argv[0].main(argv[1:])`, whose result is the exit code, as the rank that the environment says."""
    hold_stop_signals()
    die_with_parent()
    _die_with_wrapper()
    write_status(RankStatus(pid=os.getpid()))
    code, message = _run(argv[0], argv[1:])
    write_status(RankStatus(pid=os.getpid(), exit_code=code, message=message))
    # To the launcher a stop on purpose is a success: at any other code it would turn on the ranks that still close.
    return EXIT_OK if code == EXIT_PREEMPTED else code


def _run(module: str, arguments: list[str]) -> tuple[int, str | None]:
    try:
        return int(import_module(module).main(arguments)), None
    except ArcError as error:
        return exit_code_of(error), str(error)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return int(stop.code or EXIT_OK), None
        return EXIT_FAILED, str(stop.code)
    except BaseException:
        sys.stderr.write(f"rank {os.environ.get('RANK')} failed:\n{traceback.format_exc()}")
        return EXIT_FAILED, None


def write_status(status: RankStatus) -> None:
    """Leave this rank's status for the wrapper, whole or not at all."""
    path = Path(os.environ[STATUS_FOLDER_VARIABLE]) / f"rank_{int(os.environ['RANK']):05d}.json"
    write_whole(path, json.dumps(asdict(status)))


def read_statuses(folder: Path) -> dict[int, RankStatus]:
    """The statuses that the ranks have left so far: rank → status."""
    found = sorted(folder.glob("rank_*.json"))
    return {int(path.stem.removeprefix("rank_")): RankStatus(**json.loads(path.read_text())) for path in found}


def _die_with_wrapper() -> None:
    """End this process when the wrapper is gone: between them stand the launcher's two, which need not notice."""
    wrapper = int(os.environ[WRAPPER_PID_VARIABLE])
    threading.Thread(target=_wait_and_die, args=(wrapper,), daemon=True, name="wait-for-wrapper").start()


def _wait_and_die(pid: int) -> None:
    _wait_for_end(pid)
    os.kill(os.getpid(), signal.SIGKILL)


def _wait_for_end(pid: int) -> None:
    """Returns when there is no process `pid` any more (a dead one that nobody has waited for counts as gone)."""
    try:
        if hasattr(os, "pidfd_open"):
            waiting = select.poll()
            waiting.register(os.pidfd_open(pid), select.POLLIN)
            waiting.poll()
            return
        while True:
            os.kill(pid, 0)
            time.sleep(1.0)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""One rank under the wrapper: `python -m arc_ds.launch.rank MODULE ARGUMENTS...` runs `MODULE.main(arguments)`.

It adds three things to `deepspeed.launcher`. A rank saves and stops when its launcher ends. It defers stop signals
until training can handle them. It writes its actual exit code to a file because the launcher can return 0 after a rank
was killed.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

from arc_ds.errors import ArcError
from arc_ds.launch.exit_codes import EXIT_FAILED, EXIT_OK, EXIT_PREEMPTED, exit_code_of
from arc_ds.launch.parents import stop_with_launchers
from arc_ds.launch.signals import hold_stop_signals
from arc_ds.system.files import write_whole

STATUS_FOLDER_VARIABLE = "ARC_DS_STATUS_FOLDER"
WRAPPER_PID_VARIABLE = "ARC_DS_WRAPPER_PID"


@dataclass(frozen=True, kw_only=True)
class RankStatus:
    """Status of a rank.

    pid: process id.
    exit_code: None while the rank is running.
    message: error message of a user's mistake; None if there is none.
    """

    pid: int
    exit_code: int | None = None
    message: str | None = None


def main(argv: list[str]) -> int:
    """Run `argv[0].main(argv[1:])` as the rank given by the environment; its return value is the exit code."""
    hold_stop_signals()
    stop_with_launchers([int(os.environ[WRAPPER_PID_VARIABLE])])
    write_status(RankStatus(pid=os.getpid()))
    code, message = _run(argv[0], argv[1:])
    write_status(RankStatus(pid=os.getpid(), exit_code=code, message=message))
    # Report an intended stop as success: on any other code the launcher would kill ranks that are still closing.
    return EXIT_OK if code == EXIT_PREEMPTED else code


def _run(module: str, arguments: list[str]) -> tuple[int, str | None]:
    try:
        return int(import_module(module).main(arguments)), None
    except ArcError as error:
        return exit_code_of(error), str(error)
    except BaseException:
        sys.stderr.write(f"rank {os.environ.get('RANK')} failed:\n{traceback.format_exc()}")
        return EXIT_FAILED, None


def write_status(status: RankStatus) -> None:
    """Write this rank's status atomically for the wrapper."""
    path = Path(os.environ[STATUS_FOLDER_VARIABLE]) / f"rank_{int(os.environ['RANK']):05d}.json"
    write_whole(path, json.dumps(asdict(status)))


def read_statuses(folder: Path) -> dict[int, RankStatus]:
    """The statuses written so far, by rank."""
    paths = sorted(folder.glob("rank_*.json"))
    return {int(path.stem.removeprefix("rank_")): RankStatus(**json.loads(path.read_text())) for path in paths}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

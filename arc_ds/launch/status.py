"""The status files of ranks, which the launch wrapper reads, and the end of a rank from any thread."""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from arc_ds.system.files import write_whole

logger = logging.getLogger(__name__)

STATUS_FOLDER_VARIABLE = "ARC_DS_STATUS_FOLDER"


@dataclass(frozen=True, kw_only=True)
class RankStatus:
    """Status of a rank.

    pid: process id.
    exit_code: None while the rank is running.
    message: error message for users; None if there is none.
    """

    pid: int
    exit_code: int | None = None
    message: str | None = None


def end_now(code: int, message: str | None = None, *, speaks: bool = True) -> NoReturn:
    """End the process from any thread. The main thread may be blocked in C code.

    speaks: whether this rank prints the message if no wrapper does.
    """
    if STATUS_FOLDER_VARIABLE in os.environ:
        write_status(code, message)
    elif message is not None and speaks:
        logger.error("%s", message)
    exit_at_once(code)


def exit_at_once(code: int) -> NoReturn:
    """Exit without waiting for threads, worker processes and process groups: one of them may wait for a lost rank."""
    logging.shutdown()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def write_status(exit_code: int | None = None, message: str | None = None) -> None:
    """Write this rank's status atomically for the wrapper."""
    status = RankStatus(pid=os.getpid(), exit_code=exit_code, message=message)
    path = Path(os.environ[STATUS_FOLDER_VARIABLE]) / f"rank_{int(os.environ['RANK']):05d}.json"
    write_whole(path, json.dumps(asdict(status)))


def read_statuses(folder: Path) -> dict[int, RankStatus]:
    """The statuses written so far, by rank."""
    paths = sorted(folder.glob("rank_*.json"))
    return {int(path.stem.removeprefix("rank_")): RankStatus(**json.loads(path.read_text())) for path in paths}

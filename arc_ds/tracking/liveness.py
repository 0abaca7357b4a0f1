"""Whether the process of a run still works, from the run's folder, and MLflow runs whose process ended without a word.

A run that is killed with SIGKILL, or whose server is down at its end, stays RUNNING in MLflow. The lock of its folder
tells: the system frees it when the process ends, in whatever way.
"""

from __future__ import annotations

import fcntl
import json
import socket
import sqlite3
import time
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import quote

from arc_ds.system.locks import LOCK_FILE
from arc_ds.tracking.database import open_client
from arc_ds.tracking.metrics_log import METRICS_NAME
from arc_ds.tracking.mlflow_server import FOLDER_TAG
from arc_ds.tracking.system_metrics import SYSTEM_FOLDER
from arc_ds.tracking.tracking_state import recorded
from arc_ds.tracking.uris import sqlite_uri

FACTS_NAME = "facts.json"
_SILENT_S = 600.0
_RUNNING = (
    "SELECT run_uuid, name, tags.value FROM runs JOIN tags USING (run_uuid) "
    f"WHERE status = 'RUNNING' AND lifecycle_stage = 'active' AND tags.key = '{FOLDER_TAG}'"
)


class Life(NamedTuple):
    """Signs of life of a run.

    status: RUNNING, as far as this host can tell; STOPPED (it has released its lock); DEAD (its process ended without
        releasing the lock); SILENT (it holds no lock that this host sees, and its folder has not changed for 10
        minutes).
    is_here: whether the last process that held the lock was on this host, so that the status is certain.
    seen: time of the last sign, in seconds since the epoch; 0 if there is none.
    """

    status: Literal["RUNNING", "STOPPED", "DEAD", "SILENT"]
    is_here: bool
    seen: float

    @property
    def words(self) -> str:
        """End of a sentence about a run that is not RUNNING."""
        when = f"The last sign of life is of {datetime.fromtimestamp(self.seen):%Y-%m-%d %H:%M}. " if self.seen else ""
        if self.status == "SILENT":
            return f"it ran on another host, which may be down. {when}Look there."
        return f"no process of it is left. {when}Its next start continues it."


def life_of(folder: Path) -> Life:
    """Signs of life of the run in a folder."""
    signs = (folder / METRICS_NAME, folder / LOCK_FILE, *(folder / SYSTEM_FOLDER).glob("*.jsonl"))
    seen = max((path.stat().st_mtime for path in signs if path.is_file()), default=0.0)
    is_locked, host = _lock_of(folder)
    is_here = host == socket.gethostname()
    if is_locked is False and not (folder / LOCK_FILE).exists():
        return Life("STOPPED", is_here, seen)
    if is_locked is False and is_here:
        return Life("DEAD", is_here, seen)
    return Life("RUNNING" if is_locked or time.time() - seen < _SILENT_S else "SILENT", is_here, seen)


def _lock_of(folder: Path) -> tuple[bool | None, str]:
    """Whether a process holds the lock of a folder (None: this host cannot tell), and the host of its last holder."""
    try:
        with (folder / LOCK_FILE).open("rb") as file:
            host = file.read().decode(errors="replace").rpartition(" on ")[2]
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for an instant: a start tries for a second
            except BlockingIOError:
                return True, host
            return False, host
    except FileNotFoundError:
        with suppress(OSError, ValueError, KeyError, TypeError):
            return False, str(json.loads((folder / FACTS_NAME).read_text(encoding="utf-8"))["tags"]["host"])
        return False, ""
    except OSError:  # a file system without locks, or no permission
        return None, ""


def life_of_run(run_id: str, run_dir: str, database: Path | None) -> Life | None:
    """Signs of life of an MLflow run; None if this host does not see its folder.

    run_dir: its folder when it started, its tag `FOLDER_TAG`.
    database: the sqlite store, which may have moved together with the folder.
    """
    for folder in (Path(run_dir), *(() if database is None else [database.parent / Path(run_dir).name])):
        if recorded(folder, "run_id") == run_id:
            return life_of(folder)
    return None


def mark_dead_runs(database: Path) -> dict[str, str]:
    """Mark runs of an sqlite store whose process has certainly ended as KILLED, at their last sign of life.

    Returns the end of a sentence by name, for every run that is RUNNING in the store and not on its host, also if that
    is not certain.

    Raises the errors of sqlite and MLflow.
    """
    with closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True)) as connection:
        running = connection.execute(_RUNNING).fetchall()
    found = {}
    for run_id, name, run_dir in running:
        life = life_of_run(run_id, run_dir, database)
        if life is None or life.status == "RUNNING":
            continue
        found[f"{name} ({run_id})"] = life.words
        if life.is_here and life.status != "SILENT":
            client = open_client(sqlite_uri(database))
            client.set_terminated(run_id, "KILLED", end_time=round(life.seen * 1000) or None)
            again = life_of_run(run_id, run_dir, database)
            if again is not None and again.status == "RUNNING":  # it has just been started
                client.update_run(run_id, status="RUNNING")
    return found

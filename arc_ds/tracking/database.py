"""MLflow's sqlite database, and the environment in which MLflow is imported."""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arc_ds.errors import ArcError
from arc_ds.system.locks import LOCK_FILE, writing
from arc_ds.system.packages import require
from arc_ds.tracking.uris import sqlite_database, sqlite_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

# By default MLflow waits 120 s and tries 8 times; a dead server would block the thread for a quarter of an hour. It
# also sends usage telemetry by default.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_LONGEST_WAIT_S = 120.0  # for another run that creates the database: on a busy core it takes half a minute


class _IsBeingMade(ArcError):
    """Another process is creating the database."""


def open_client(uri: str) -> MlflowClient:
    """Import MLflow and connect to a tracking URI. A sqlite database is created if it does not exist.

    Any error may come: of the import, the disk or MLflow.
    """
    require("mlflow")
    database = sqlite_database(uri)
    set_environment()
    if database is not None:
        # With a pool, MLflow would keep writing to the file of a database that was removed or replaced.
        os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
        uri = for_mlflow(uri)
    with home():
        from mlflow import MlflowClient
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it reports each pool and table
    if database is not None:
        make_database(database)
    return MlflowClient(tracking_uri=uri)


def paged(search: Callable[..., Any], *arguments: Any, **options: Any) -> Iterator[Any]:
    """All results of a search of MLflow's client, which gives one page at a time."""
    token = None
    while True:
        page = search(*arguments, page_token=token, **options)
        yield from page
        token = page.token
        if not token:
            return


def artifact_folder(database: Path) -> Path:
    """Where the artifacts of a database lie. MLflow's own default is ./mlruns of the current folder.

    All runs of an experiment share the place, so the folder of one run must not hold it.
    """
    return database.parent / "mlartifacts"


def make_database(path: Path) -> None:
    """Create MLflow's database file atomically if it does not exist, or if it is empty.

    MLflow needs seconds to create its tables, and it can neither use nor repair a database left by a kill. Two
    processes that create the tables at once disturb each other. So one process creates them in a hidden folder, under a
    lock, and the others wait for the finished file. SQLite leaves an empty file if it opens a database that was
    removed.

    Raises TimeoutError if another process creates the database and does not finish.
    """
    workshop = path.parent / f".{path.name}-new"
    deadline = time.monotonic() + _LONGEST_WAIT_S
    while not _is_made(path):
        try:
            with writing(workshop, "MLflow database", _IsBeingMade):
                if not _is_made(path):
                    _make(path, workshop)
        except _IsBeingMade as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path} is not ready after {_LONGEST_WAIT_S:.0f} s: {error}") from error
    if workshop.exists():
        # Left by a kill, or in use by a process that has just finished.
        with suppress(_IsBeingMade), writing(workshop, "MLflow database", _IsBeingMade):
            _clear(workshop)
        with suppress(OSError):
            workshop.rmdir()
    with closing(sqlite3.connect(path)) as database:  # MLflow would try for 100 s before it reports a fault
        database.execute("SELECT 1 FROM sqlite_master LIMIT 1")


def _is_made(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _make(path: Path, workshop: Path) -> None:
    from mlflow import MlflowClient

    _clear(workshop)
    with tempfile.TemporaryDirectory(dir=workshop) as folder:
        made = Path(folder) / path.name
        MlflowClient(tracking_uri=for_mlflow(sqlite_uri(made))).search_experiments(max_results=1)
        if path.exists() and path.stat().st_size == 0:
            path.unlink()
        try:
            os.link(made, path)
        except FileExistsError:
            pass  # on a file system without locks, another run created it in the meantime
        except OSError:
            made.replace(path)  # a file system without hard links


def _clear(workshop: Path) -> None:
    for leftover in workshop.iterdir():
        if leftover.name != LOCK_FILE:
            shutil.rmtree(leftover, ignore_errors=True)


def set_environment() -> None:
    """Set MLflow's variables that the user has not set. Call it before MLflow is imported."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def for_mlflow(uri: str) -> str:
    """The URI of a sqlite database with its driver. Without it, MLflow creates a folder of the still quoted path."""
    return uri.replace("sqlite:", "sqlite+pysqlite:", 1) if "%" in uri else uri


@contextmanager
def home() -> Iterator[None]:
    """A HOME while MLflow is imported: it asks for the home folder, which a user without a passwd entry lacks.

    DeepSpeed tries the same import earlier. If that failed, its remains in `sys.modules` would make ours fail too.
    """
    if "mlflow" in sys.modules or os.path.expanduser("~") != "~":
        yield
        return
    for name in [name for name in sys.modules if name.startswith("mlflow.")]:
        del sys.modules[name]
    os.environ["HOME"] = tempfile.gettempdir()
    try:
        yield
    finally:
        del os.environ["HOME"]

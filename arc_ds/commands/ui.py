"""`arc-ds ui`: the MLflow user interface on the store of a folder of runs."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from arc_ds.errors import ConfigError
from arc_ds.system.packages import require
from arc_ds.system.user_paths import path_argument
from arc_ds.tracking.database import artifact_folder, for_mlflow, set_environment
from arc_ds.tracking.faults import words_of
from arc_ds.tracking.liveness import mark_dead_runs
from arc_ds.tracking.metrics_log import METRICS_NAME
from arc_ds.tracking.tracking_state import recorded
from arc_ds.tracking.uris import (
    DATABASE,
    URI_VARIABLE,
    database_of,
    default_folders,
    default_store,
    sqlite_database,
    sqlite_uri,
    without_secret,
)

_START_S = 120.0  # importing MLflow on a busy machine
_STOP_S = 2.0  # its parent process does not end by itself
_PORT = 5000
# Of the server itself: background jobs would start five more processes.
_ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser("ui", description="Open the MLflow store of a folder of runs. Ctrl-C ends it.")
    parser.add_argument(
        "folder",
        nargs="?",
        type=path_argument,
        help="a folder that holds runs, a run's folder, or a database; default: the first with a store of $RUNS, . and "
        "./runs",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: %(default)s, this machine")
    parser.add_argument("--port", default=_PORT, type=int, help="port; 0 chooses a free one; default: %(default)s")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve the store until Ctrl-C; return 0. Raises ConfigError if there is none, or if the port is in use."""
    require("mlflow")
    database = find_database(args.folder)
    port = _free_port(args.host, args.port, args.folder or database.parent)
    set_environment()
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", args.host, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", for_mlflow(sqlite_uri(database))),
        *("--default-artifact-root", artifact_folder(database).as_uri(), "--no-serve-artifacts"),
        *("--uvicorn-opts", "--log-level warning"),
    ]
    # In a session of its own, so that Ctrl-C reaches this command alone, which then ends the server and its workers.
    server = subprocess.Popen(command, env={**_ENVIRONMENT, **os.environ}, stdout=2, start_new_session=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        url = f"http://{_in_url(args.host)}:{port}"
        _await(server, url, database)
        _tell_dead_runs(database)
        print(f"{database} is open at {url} (Ctrl-C ends it)", flush=True)
        return int(server.wait())
    except KeyboardInterrupt:
        return 0
    finally:
        _stop(server)


def _tell_dead_runs(database: Path) -> None:
    """Mark runs whose process has ended without a word. The page opens also if that fails."""
    try:
        for name, words in mark_dead_runs(database).items():
            print(f"{name} is marked as running, but {words}", flush=True)
    except Exception as error:  # another program may hold the database
        print(f"runs that were killed stay RUNNING: {words_of(error)}", file=sys.stderr)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _in_url(host: str) -> str:
    """A host as it stands in an address of this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def find_database(folder: Path | None) -> Path:
    """The database of a folder of runs, of a run's folder, or the given file itself.

    folder: None for the default store.

    Raises ConfigError that says what the folder holds instead, and what to do.
    """
    if folder is None:
        store = default_store()
        database = None if store is None else sqlite_database(store)
        if store is not None and database is None:
            raise ConfigError(f"{URI_VARIABLE} is the server {without_secret(store)}. Open that address in a browser.")
        folder = database or default_folders()[0]
    if (found := folder.resolve() if folder.is_file() else database_of(folder)) is not None:
        return found
    folder = folder.resolve()
    uri = recorded(folder, "uri")
    if uri is not None and sqlite_database(uri) is None:
        raise ConfigError(f"the run in {folder} is tracked by the server {uri}. Open that address in a browser.")
    if not folder.is_dir():
        raise ConfigError(f"{folder} does not exist. Give the folder that holds your runs: arc-ds ui FOLDER")
    raise ConfigError(f"{folder} holds no MLflow store ({DATABASE}). {_remedy(folder)}")


def _remedy(folder: Path) -> str:
    """The remedy for a folder without a database, by its content."""
    if (folder / METRICS_NAME).is_file():
        return (
            "This run was made with tracking.mlflow=false, or its server has never answered. Start it again with its "
            "command and tracking.mlflow=true: it sends all of metrics.jsonl."
        )
    if stores := sorted(folder.glob(f"*/{DATABASE}")) or sorted(folder.glob(f"*/*/{DATABASE}")):
        return f"Its subfolders do. Try: arc-ds ui {stores[0].parent}"
    if runs := sorted(folder.glob(f"*/{METRICS_NAME}")):
        return (
            f"It holds {len(runs)} runs without one. Start a run again with its command and tracking.mlflow=true, or "
            "open the server that MLFLOW_TRACKING_URI named."
        )
    return "A run writes one into the folder that holds its run_dir: give that folder."


def _free_port(host: str, port: int, folder: Path) -> int:
    """The port to listen on. Raises ConfigError if it is in use, or if the address is not of this machine."""
    if not 0 <= port < 2**16:
        raise ConfigError(f"--port {port} is no port. Give a number below 65536, or 0 for a free one.")
    try:
        return _bind(host, port)
    except OSError as error:
        with suppress(OSError):
            free = _bind(host, 0)
            raise ConfigError(
                f"port {port} is taken ({error.strerror}), perhaps by another `arc-ds ui`. Take another one: arc-ds ui "
                f"{folder} --port {free}"
            ) from error
        raise ConfigError(f"cannot listen on --host {host}: {error.strerror}. Leave --host out.") from error


def _bind(host: str, port: int) -> int:
    """Bind a port for an instant and return its number."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        return int(probe.getsockname()[1])


def _await(server: subprocess.Popen[bytes], url: str, database: Path) -> None:
    """Wait until the server answers. Raises ConfigError if it ends first."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        with suppress(OSError), opener.open(f"{url}/health", timeout=2.0):
            return
        if (code := server.poll()) is not None:
            raise ConfigError(
                f"mlflow server ended with code {code}; its messages are above. If they say that the schema is out of "
                f"date: mlflow db upgrade {sqlite_uri(database)}"
            )
        time.sleep(0.2)
    raise ConfigError(f"mlflow server does not answer at {url} after {_START_S:.0f} s; its messages are above.")


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server with its workers."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with suppress(subprocess.TimeoutExpired):
            server.wait(_STOP_S)
            return

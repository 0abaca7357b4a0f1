"""Addresses of tracking servers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.parse import unquote, urlsplit

from arc_ds.errors import ConfigError
from arc_ds.system.user_paths import user_path
from arc_ds.tracking.metrics_log import METRICS_NAME
from arc_ds.tracking.tracking_state import recorded

HOST_AND_PORT = re.compile(r"[\w.-]+:\d+")
URI_VARIABLE = "MLFLOW_TRACKING_URI"
DATABASE = "mlflow.db"
_USER = re.compile(r"([A-Za-z][\w+.-]*://)[^/?#\s]*@")
_WORDS = ("databricks", "databricks-uc", "uc")  # MLflow's addresses without a scheme
_ALLOW_FOLDERS = "MLFLOW_ALLOW_FILE_STORE"
_FIRST_WITHOUT_FOLDERS = (3, 13)


def resolve_uri(folder: Path, configured: str | None) -> str:
    """The tracking URI of a run: from the environment, else from the config, else that of `default_database`.

    A plain path becomes a file: URI, because MLflow would unquote it.

    folder: the run's folder.
    configured: tracking.uri.
    """
    uri = user_path(os.environ.get(URI_VARIABLE, "")) or configured
    if not uri:
        return sqlite_uri(default_database(folder))
    return Path(uri).absolute().as_uri() if uri not in _WORDS and _scheme(uri) == "" else uri


def default_database(folder: Path) -> Path:
    """The database of a run that names no other: `mlflow.db` in the folder that holds the run's folder.

    All runs there share it. A run continues in its own folder if that has a database, as those of earlier versions do,
    or if it is the only one of the two folders that can be written.

    folder: the run's folder.
    """
    own = folder.resolve()
    is_alone = own.is_dir() and not os.access(own.parent, os.W_OK) and os.access(own, os.W_OK)
    return (own if is_alone or is_filled(own / DATABASE) else own.parent) / DATABASE


def is_filled(path: Path) -> bool:
    """Whether a database exists. SQLite leaves an empty file if it opens one that was removed."""
    return path.is_file() and path.stat().st_size > 0


def default_folders() -> list[Path]:
    """The folders that commands search for a store if the user names none: $RUNS, the current folder, and ./runs."""
    return list(dict.fromkeys(Path(user_path(each)) for each in (os.environ.get("RUNS") or ".", ".", "runs")))


def default_store() -> str | None:
    """The store that commands read if the user names none: MLFLOW_TRACKING_URI, or the first of `default_folders`.

    None if there is none.
    """
    if given := user_path(os.environ.get(URI_VARIABLE, "")):
        return given if _scheme(given) or given in _WORDS else sqlite_uri(Path(given).absolute())
    database = next(filter(None, map(database_of, default_folders())), None)
    return None if database is None else sqlite_uri(database)


def database_of(folder: Path) -> Path | None:
    """The database of a folder of runs or of a run's folder; None if there is none.

    A run has a database in its folder, as those of earlier versions, or the recorded one, or one next to its folder.
    """
    folder = folder.resolve()
    return next(filter(is_filled, _places_of_database(folder)), None)


def _places_of_database(folder: Path) -> Iterator[Path]:
    yield folder / DATABASE
    uri = recorded(folder, "uri")
    if uri is not None and (database := sqlite_database(uri)) is not None:
        yield database
    if (folder / METRICS_NAME).is_file():
        yield folder.parent / DATABASE


def sqlite_uri(database: Path) -> str:
    """URI of a sqlite database. SQLAlchemy itself quotes the path, because its versions read % and ? differently."""
    if not set("%?") & set(str(database)):
        return f"sqlite:///{database}"
    from sqlalchemy.engine import URL

    return URL.create("sqlite", database=str(database)).render_as_string()


def sqlite_database(uri: str) -> Path | None:
    """The file of a sqlite URI; None for other URIs, for a database in memory, and for one with options."""
    if _scheme(uri).partition("+")[0] != "sqlite":
        return None
    from sqlalchemy.engine import make_url

    url = make_url(uri)
    return None if url.query or url.database in (None, "", ":memory:") else Path(str(url.database)).absolute()


def file_store(uri: str) -> Path | None:
    """The folder of a file: URI; None for other URIs."""
    return Path(unquote(urlsplit(uri).path)) if _scheme(uri) == "file" else None


def check_uri(folder: Path, configured: str | None) -> None:
    """Raise ConfigError if the tracking URI is a folder and the installed MLflow no longer writes to folders.

    folder: the run's folder.
    configured: tracking.uri.
    """
    store = file_store(resolve_uri(folder, configured))
    allowed = os.environ.get(_ALLOW_FOLDERS, "").lower() in ("true", "1")
    if store is None or allowed or _mlflow_version() < _FIRST_WITHOUT_FOLDERS:
        return
    key = URI_VARIABLE if os.environ.get(URI_VARIABLE) else "tracking.uri"
    if host := HOST_AND_PORT.fullmatch(store.name):
        raise ConfigError(f"{key} names no protocol. Set {key}=http://{host[0]}")
    is_database = store.suffix in (".db", ".sqlite", ".sqlite3") or store.is_file()
    raise ConfigError(
        f"{key} is the folder {store}, but MLflow {'.'.join(map(str, _FIRST_WITHOUT_FOLDERS))} and later do not write "
        f"to folders. Set it to a database: {key}={sqlite_uri(store if is_database else store / DATABASE)}. Or set "
        f"{_ALLOW_FOLDERS}=true in the environment."
    )


def _mlflow_version() -> tuple[int, ...]:
    """Major and minor version of the installed MLflow; zeros if it is not installed."""
    try:
        return tuple(int(part) for part in version("mlflow").split(".")[:2])
    except PackageNotFoundError:
        return 0, 0


def without_secret(text: str) -> str:
    """A URI, or a text with URIs, without users and passwords, for logs and files."""
    return _USER.sub(r"\1", text)


def _scheme(uri: str) -> str:
    return match[1].lower() if (match := re.match(r"([A-Za-z][\w+.-]*):", uri)) else ""

"""Faults of a tracking server: their words, and whether time can mend them. Types and codes decide, never a text."""

from __future__ import annotations

import errno
import sqlite3
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from arc_ds import errors
from arc_ds.errors import ArcError, ConfigError
from arc_ds.tracking.uris import HOST_AND_PORT, without_secret

# HTTP statuses of a server that is busy or restarts.
_PASSING_STATUS = frozenset({408, 409, 425, 429, 499})
# MLflow gives this code to all faults of its database except a lost connection, even to an exhausted pool.
_DATABASE_CODE = "BAD_REQUEST"
# Numbers of SQLite (Python 3.11 and later): no permission, read-only, damaged, cannot be opened, not a database.
_LASTING_SQLITE = frozenset({3, 8, 11, 14, 26})
_DAMAGED = 11
_LASTING_ERRNO = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
)


def words_of(error: BaseException) -> str:
    """Type and whole message of an error in one line, without passwords."""
    return without_secret(f"{type(error).__name__}: {errors.words_of(error)}")


def is_refused(error: BaseException) -> bool:
    """Whether MLflow refuses the content of a request, for example a name or a length."""
    return getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE"


def is_lasting(error: BaseException, uri: str) -> bool:
    """Whether the same request will fail at any later time, for example because of a wrong address or password."""
    chain = list(_chain(error))
    if any(isinstance(each, ssl.SSLCertVerificationError) for each in chain):
        return True
    verdicts = (verdict for each in chain if (verdict := _verdict(each)) is not None)
    is_answer = uri.startswith(("http:", "https:", "databricks")) and any(_status(each) is not None for each in chain)
    return next(verdicts, not is_answer)  # a server, or a proxy before it, may answer anything while it is down


def remedy(error: BaseException, uri: str) -> str:
    """The remedy of a lasting fault, for its message; empty if the message already ends with one."""
    if isinstance(error, ArcError):
        return ""  # its message ends with the remedy
    if isinstance(error, ImportError):
        return "Install the missing package. "
    if _status(error) in (401, 403):
        return (
            "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, to a user who may "
            "write there. A server also answers 403 if its --allowed-hosts lacks the name in the address. "
        )
    if any(isinstance(each, ssl.SSLCertVerificationError) for each in _chain(error)):
        return "Set MLFLOW_TRACKING_SERVER_CERT_PATH to the certificate of the server's authority. "
    if any(getattr(each, "sqlite_errorcode", 0) & 0xFF == _DAMAGED for each in _chain(error)):
        return "Restore that file, or remove it: each run fills a new one from its metrics.jsonl at its next start. "
    if host := HOST_AND_PORT.match(uri):
        return f"Set tracking.uri to http://{host[0]}. "
    return "Correct tracking.uri, or MLFLOW_TRACKING_URI, which overrides it. "


@contextmanager
def explained(uri: str, failure: str, kind: type[ArcError] = ConfigError) -> Iterator[None]:
    """A block that talks to a store for a user, who waits. Errors of the store get words and a remedy.

    failure: first words of the message.
    kind: class of the error.
    """
    try:
        yield
    except Exception as error:
        is_of_store = isinstance(error, OSError | sqlite3.Error) or _is_a(error, "sqlalchemy.exc", "SQLAlchemyError")
        if not is_of_store and _status(error) is None:
            raise
        cure = remedy(error, uri) if is_lasting(error, uri) else "Try again when the store answers. "
        raise kind(f"{failure} at {without_secret(uri)}: {words_of(error)}. {cure}".rstrip()) from error


def _verdict(error: BaseException) -> bool | None:
    """Whether this error is lasting; None if its cause decides."""
    if isinstance(error, ArcError | ImportError):
        return True
    if (status := _status(error)) is not None:
        if status < 500 and getattr(error, "error_code", None) != _DATABASE_CODE:
            return status not in _PASSING_STATUS
        if _is_a(error, "mlflow.exceptions", "RestException"):
            return False
        return True if status < 500 and error.__cause__ is None else None
    if _is_a(error, "requests.exceptions", "RequestException"):
        return isinstance(error, ValueError)  # a malformed URL or an unknown scheme
    if (code := getattr(error, "sqlite_errorcode", None)) is not None:
        return code & 0xFF in _LASTING_SQLITE
    if isinstance(error, sqlite3.OperationalError):
        return False  # before Python 3.11, which has no codes; a locked database is such an error
    if _is_a(error, "sqlalchemy.exc", "DBAPIError", "TimeoutError"):
        return None if hasattr(error.__cause__, "sqlite_errorcode") else False
    if isinstance(error, OSError):
        return error.errno in _LASTING_ERRNO
    return None


def _status(error: BaseException) -> int | None:
    """HTTP status that MLflow gives to its error; None for other errors."""
    return error.get_http_status_code() if _is_a(error, "mlflow.exceptions", "MlflowException") else None  # type: ignore[attr-defined]


def _is_a(error: BaseException, module: str, *names: str) -> bool:
    """Whether an error is of a class of a module. Before the module is imported, no such error exists."""
    return any(isinstance(error, getattr(sys.modules.get(module), name, ())) for name in names)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)

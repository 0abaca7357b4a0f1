"""Applies a function to items on the workers of a Ray cluster, in order and with a bounded number in flight."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from itertools import chain, islice
from typing import Any, TypeVar

import ray
from ray._private import worker as ray_worker
from ray.exceptions import RayError, RayTaskError

from arc_ds.errors import DataError, StorageError, words_of
from arc_ds.shards.parallel import AHEAD, Engine
from arc_ds.system.processes import num_cores
from arc_ds.version import __version__

logger = logging.getLogger(__name__)

_MAX_ATTEMPTS = 4  # of one item whose workers die
_CONNECT_S = 10.0
_CHECK_S = 10.0  # between two looks at the head of the cluster
_HTTP2_BEGIN = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # with empty settings
_HTTP2_SETTINGS = 4  # type of the first frame of an answer
_OBJECT_BYTES = 8 << 20  # of the local object store, for an item and its result
_MIN_STORE_BYTES = 128 << 20
_T = TypeVar("_T")
_R = TypeVar("_R")


@contextmanager
def ray_cluster(address: str | None = None, num_workers: int | None = None) -> Iterator[int]:
    """Connect to a Ray cluster, or start Ray on this host, for calls of `map_on_ray` in the block.

    If the program is connected to a cluster already, that one is used and stays connected.

    address: `host:port`; "auto" for the cluster that this host belongs to; None for $RAY_ADDRESS or, if that is not
        set, a Ray of our own on this host.
    num_workers: maximum number of tasks that run at the same time; None for the number of CPUs of the cluster.

    Yields the number of workers. Raises DataError if `num_workers` is invalid, and StorageError if the cluster cannot
    be reached.
    """
    if num_workers is not None and num_workers < 1:
        raise DataError(f"{num_workers} workers cannot do anything. Give at least 1 (--workers).")
    if ray.is_initialized():  # by the caller's program
        yield num_workers or _num_cpus()
        return
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray reports dead workers on standard output, which belongs to the command, and has no public option against it.
    # `_next_result` reports them in the log.
    are_reported = getattr(ray_worker, "_worker_logs_enabled", True)
    ray_worker._worker_logs_enabled = False
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        _connect(address or os.environ.get("RAY_ADDRESS") or "local", num_workers)
        yield num_workers or _num_cpus()
    finally:
        ray.shutdown()
        ray_worker._worker_logs_enabled = are_reported
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray has replaced it


@contextmanager
def on_cluster(address: str | None, num_workers: int | None) -> Iterator[Engine]:
    """An engine on the cluster of `ray_cluster`, for calls in the block. Its first item connects it, so an error in
    the inputs comes before Ray starts. It ignores the number of workers that its caller gives."""
    with ExitStack() as stack:
        connected = cache(lambda: stack.enter_context(ray_cluster(address, num_workers)))

        def engine(
            function: Callable[[_T], _R], items: Iterable[_T], _num_workers: int
        ) -> Generator[tuple[_T, _R], None, None]:
            items = iter(items)
            for first in islice(items, 1):
                yield from map_on_ray(function, chain((first,), items), connected())

        yield engine


def _num_cpus() -> int:
    """The CPUs of the connected cluster. Raises StorageError if it has none."""
    num_cpus = int(ray.cluster_resources().get("CPU", 0))
    if num_cpus < 1:
        raise StorageError("the Ray cluster has no CPUs. Start a host that has some: ray start --num-cpus N")
    return num_cpus


def _connect(address: str, num_workers: int | None) -> None:
    """Start a local Ray or connect to a cluster. Ray itself tries a wrong address for minutes and then exits."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if address == "local":
        num_cpus = num_workers or num_cores()
        store_bytes = max(_MIN_STORE_BYTES, num_cpus * AHEAD * _OBJECT_BYTES)
        options |= {"num_cpus": num_cpus, "include_dashboard": False, "object_store_memory": store_bytes}
    elif address != "auto":
        _check_answers(address)
    try:
        ray.init(address=address, **options)
    except (OSError, RuntimeError, ValueError, SystemExit) as error:
        raise StorageError(
            f"cannot use the Ray cluster {address}: {words_of(error).rstrip('.')}. Run `ray start --head` on one host, "
            "`ray start --address=HOST:PORT` on every other one, with equal versions of Ray and Python, and this "
            "command on one of them. Leave out --ray-address and RAY_ADDRESS to start Ray on this host alone."
        ) from error


def _check_answers(address: str) -> None:
    """Raise StorageError if no cluster answers at an address. Ray's servers speak HTTP/2, its dashboard does not."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise StorageError(
            f"the Ray address {address!r} is not usable: expected auto or HOST:PORT, such as 10.0.0.1:6379 (`ray start "
            "--head` prints it). Run the command on a host of the cluster; ray:// addresses are for other clients."
        )
    try:
        with socket.create_connection((host, int(port)), timeout=_CONNECT_S) as connection:
            connection.sendall(_HTTP2_BEGIN)
            if connection.recv(9)[3:4] != bytes([_HTTP2_SETTINGS]):
                raise ConnectionError("another program listens there, such as Ray's dashboard")
    except (OSError, OverflowError) as error:
        raise StorageError(
            f"no Ray cluster answers at {address}: {error}. Check the address, and that `ray start --head` runs there."
        ) from error


def map_on_ray(
    function: Callable[[_T], _R], items: Iterable[_T], num_workers: int
) -> Generator[tuple[_T, _R], None, None]:
    """Like `arc_ds.shards.parallel.map_in_order`, on the hosts of the connected cluster.

    An item whose worker dies, or whose result is lost with its host, is given to another worker.

    Raises DataError if the workers of one item keep dying, or if a worker has another version of ARC-DS. Raises
    StorageError if the head of the cluster is lost, which Ray itself reports after a minute, by ending the program.
    """
    # Retries by Ray would be endless for a lack of memory.
    remote = ray.remote(max_retries=0, num_cpus=1)(_call_by_value())
    call = partial(remote.remote, __version__, os.getcwd(), ray.put(pickle.dumps(function)))

    head, checked = ray.get_runtime_context().gcs_address, time.monotonic()

    def submit(item: _T) -> Any:
        return call(pickle.dumps(item))

    def wait_for(reference: Any) -> None:
        nonlocal checked
        is_ready = False
        while not is_ready:
            if time.monotonic() - checked > _CHECK_S:
                _check_answers(head)
                checked = time.monotonic()
            is_ready = bool(ray.wait([reference], timeout=_CHECK_S)[0])

    in_flight: deque[tuple[_T, Any]] = deque()
    try:
        for item in items:
            in_flight.append((item, submit(item)))
            if len(in_flight) == num_workers * AHEAD:
                yield _next_result(in_flight, submit, wait_for)
        while in_flight:
            yield _next_result(in_flight, submit, wait_for)
    finally:
        for _, reference in in_flight:
            ray.cancel(reference)


def _next_result(
    in_flight: deque[tuple[_T, Any]], submit: Callable[[_T], Any], wait_for: Callable[[Any], None]
) -> tuple[_T, Any]:
    """Take the oldest item, wait for its result and return both. `submit` is called again if its worker dies."""
    item, reference = in_flight.popleft()
    for attempt in range(1, _MAX_ATTEMPTS + 1):
        try:
            wait_for(reference)
            return item, ray.get(reference)
        except RayTaskError as error:
            raise _error_of_task(error) from error
        except RayError as error:
            if attempt == _MAX_ATTEMPTS:
                raise DataError(
                    f"{attempt} Ray workers died one after the other on {item}, most likely for lack of memory "
                    f"({words_of(error)[:200]}). Run the same command again with fewer --workers."
                ) from error
            logger.warning("a Ray worker was lost (%s). Another one does its work: %s", type(error).__name__, item)
            reference = submit(item)
    raise AssertionError("the last attempt returns or raises")


def _error_of_task(error: Any) -> BaseException:
    """The error that a task raised."""
    cause = error.cause
    if isinstance(cause, ImportError):
        return DataError(
            f"a Ray worker cannot import a package: {cause}. Install the same version of ARC-DS ({__version__}) and "
            "its extras in the Python environment of every host, and restart Ray there."
        )
    return cause if isinstance(cause, BaseException) else error


def _call_by_value() -> Callable[..., Any]:
    """The function that workers run. Ray sends it whole, so that a worker without ARC-DS can report this."""

    def call(version: str, folder: str, function: bytes, item: bytes) -> Any:
        import os
        import pickle
        import socket
        from contextlib import suppress

        from arc_ds.errors import DataError
        from arc_ds.version import __version__

        if version != __version__:
            raise DataError(
                f"the Ray worker on {socket.gethostname()} has ARC-DS {__version__}; the command has {version}. "
                "Install the same version on every host and restart Ray there."
            )
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers share the host's cores
        with suppress(OSError):
            os.chdir(folder)  # paths may be relative to the folder of the command
        return pickle.loads(function)(pickle.loads(item))

    return call

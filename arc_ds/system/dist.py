"""Ranks: identity of this process, process group, collectives for small objects, and errors shared by all ranks.

A run fails on all ranks or on none. If a single rank raised an error, the others would wait in a collective forever.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as torch_dist

from arc_ds.errors import ArcError, LostRankError
from arc_ds.system.device import backend_name

logger = logging.getLogger(__name__)

# Harmless library messages that are suppressed: logger and phrase. DeepSpeed has not tested our AdamW; our tests do.
_CHATTER = (
    ("DeepSpeed", "untested optimizer"),
    ("mlflow.store.db.utils", "database tables"),
)

_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def under_launcher() -> bool:
    """Whether a launcher (deepspeed, torchrun) started this process and set its rank in the environment."""
    return all(name in os.environ for name in _PLACE)


def rank() -> int:
    """Rank of this process in the run; 0 without a launcher."""
    return torch_dist.get_rank() if _is_joined() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes of the run."""
    return torch_dist.get_world_size() if _is_joined() else int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Rank of this process on its host."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Number of processes of the run on this host (torchrun and DeepSpeed use different variables)."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if name in os.environ:
            return int(os.environ[name])
    return world_size()


def is_main() -> bool:
    """Whether this is rank 0, the only rank that writes files shared by the run."""
    return rank() == 0


def meeting_point() -> str:
    """Address at which the ranks find each other."""
    return f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', 'a free port')}"


def rank_in_words() -> str:
    """This rank and its host, for messages."""
    return f"rank {rank()} on {socket.gethostname()}"


def ranks_in_words(ranks: Iterable[tuple[int, str]]) -> str:
    """Ranks in ascending order and their hosts, such as "ranks 0-2, 5 on node1, rank 8 on node2"."""
    spans: dict[str, list[list[int]]] = {}
    for rank, host in ranks:
        of_host = spans.setdefault(host, [])
        if of_host and rank == of_host[-1][1] + 1:
            of_host[-1][1] = rank
        else:
            of_host.append([rank, rank])
    words = []
    for host, of_host in spans.items():
        numbers = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in of_host)
        words.append(f"rank{'s' * (not numbers.isdecimal())} {numbers} on {host}")
    return ", ".join(words)


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1 and _is_joined():
        torch_dist.barrier()


def init_distributed(device: torch.device, timeout_s: float = 300.0) -> None:
    """Join the process group through DeepSpeed. A process without a launcher forms a group of one. Safe to call again.

    timeout_s: time for the ranks to find each other, and for a collective (see `limit_collectives`).

    Raises LostRankError if the ranks do not find each other.
    """
    if not under_launcher():
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        os.environ.update({name: str(value) for name, value in alone.items()})
    # DeepSpeed selects its accelerator at import time; without this variable it would use a GPU even for device=cpu.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    # Torch renamed collectives that DeepSpeed 0.19 still calls; the warning would appear at every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device.type == "cpu":
        # Otherwise the first start compiles a C++ extension for about 90 s, and fails without a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Without this variable, which only its own launcher sets, DeepSpeed starts a process in every reduction.
        os.environ.setdefault("LOCAL_SIZE", str(local_world_size()))
    try:
        deepspeed.init_distributed(
            dist_backend=backend_name(device), timeout=timedelta(seconds=timeout_s), verbose=False
        )
    except torch_dist.DistError as error:
        raise LostRankError(
            f"{rank_in_words()} did not find the other ranks at {meeting_point()}: "
            f"{str(error).splitlines()[0].rstrip('.')}. Give "
            f"all {world_size()} ranks the same MASTER_ADDR (the host of rank 0) and MASTER_PORT (a port that no other "
            "program uses there), and start them all."
        ) from error


def limit_collectives(timeout_s: float) -> None:
    """Set the time limit of collectives in all process groups that exist now.

    By default a group of NCCL, also one that DeepSpeed made, aborts the process after 10 minutes without a message. The
    heartbeat and the watchdog find the cause of a hang, so this limit must be longer than theirs.
    """
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def close_distributed() -> None:
    """Leave the process group if this process has joined one."""
    if _is_joined():
        torch_dist.destroy_process_group()


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all ranks, in rank order, on every rank. Values must be picklable and small. Collective."""
    if not _is_joined() or world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value on every rank. Collective."""
    if not _is_joined() or world_size() == 1:
        return value
    values = [value]
    torch_dist.broadcast_object_list(values, src=0)
    return values[0]


def raise_together(error: Exception | None) -> None:
    """If at least one rank has an error, raise it on every rank. Collective.

    All ranks raise the error of the first rank that has one. Errors outside the `ArcError` hierarchy are raised as
    `ArcError`. If not all ranks have the same error, the message starts with the number of that rank.
    """
    cls = type(error) if isinstance(error, ArcError) else ArcError
    failures = gather_objects(None if error is None else (cls, str(error)))
    first = next((number for number, failure in enumerate(failures) if failure is not None), None)
    if first is None:
        return
    if error is not None and all(failure == failures[first] for failure in failures):
        if isinstance(error, ArcError):
            error.is_of_all_ranks = True
        raise error
    cls, message = failures[first]
    shared = cls(f"rank {first}: {message}")
    shared.is_of_all_ranks = True
    raise shared from error


@contextmanager
def fail_together() -> Iterator[None]:
    """Context in which an `ArcError` on one rank is raised on all ranks at the end of the block.

    The block must not contain a collective, and every rank must enter it the same number of times. Other exceptions
    propagate unchanged; the launcher then ends the remaining ranks.
    """
    error: ArcError | None = None
    try:
        yield
    except ArcError as caught:
        error = caught
    raise_together(error)


def passes_rank(record: logging.LogRecord) -> bool:
    """Filter for log handlers: all records of rank 0 and warnings of every rank. Adds `rank` to each record."""
    record.__dict__["rank"] = number = rank()
    return number == 0 or record.levelno >= logging.WARNING


def setup_logging() -> None:
    """Log to stderr through `passes_rank`, one line per record. A second call does nothing."""
    root = logging.getLogger()
    if any(passes_rank in handler.filters for handler in root.handlers):
        return
    root.setLevel(logging.INFO)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    for logger_name, phrase in _CHATTER:
        logging.getLogger(logger_name).addFilter(partial(_lacks, phrase))
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(passes_rank)
    pattern = "%(asctime)s [%(rank)d] %(levelname)s %(name)s: %(message)s"
    handler.setFormatter(logging.Formatter(pattern, datefmt="%H:%M:%S"))
    root.addHandler(handler)


def _lacks(phrase: str, record: logging.LogRecord) -> bool:
    return phrase not in record.getMessage()


def free_port() -> int:
    """A TCP port that is currently free on this host."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_joined() -> bool:
    return torch_dist.is_available() and torch_dist.is_initialized()

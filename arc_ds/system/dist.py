"""Ranks: who this process is, how it joins the others, and how an error found by one becomes an error of all.

A run fails on all ranks or on none: a rank that raises alone leaves the others waiting in a collective for ever.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist

from arc_ds.errors import ArcError
from arc_ds.system.device import accelerator_name, backend_name

logger = logging.getLogger(__name__)

# What libraries say about a run that is as it should be: logger and phrase. Our AdamW is one that DeepSpeed has not
# tested; our tests have.
_CHATTER = (
    ("DeepSpeed", "untested optimizer"),
    ("mlflow.store.db.utils", "database tables"),
)

_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def under_launcher() -> bool:
    """Whether a launcher (deepspeed, torchrun) started this process and told it its place."""
    return all(name in os.environ for name in _PLACE)


def rank() -> int:
    """This process's number in the run; 0 where there is only one."""
    return torch_dist.get_rank() if _is_joined() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes the run has."""
    return torch_dist.get_world_size() if _is_joined() else int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """This process's number on its host."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """How many processes the run has on this host (torchrun and DeepSpeed name it differently)."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if name in os.environ:
            return int(os.environ[name])
    return world_size()


def is_main() -> bool:
    """Whether this is rank 0, which alone writes what there is one of."""
    return rank() == 0


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1 and _is_joined():
        torch_dist.barrier()


def init_distributed(device: torch.device, timeout: timedelta = timedelta(minutes=30)) -> None:
    """Join the process group through DeepSpeed; a process without a launcher becomes a group of one.

    timeout: how long a collective may wait. Safe to call again.
    """
    if not under_launcher():
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        os.environ.update({name: str(value) for name, value in alone.items()})
    # DeepSpeed reads its accelerator from the environment at its import, and would take a GPU that is not wanted.
    os.environ.setdefault("DS_ACCELERATOR", accelerator_name(device))
    import deepspeed

    # Torch renamed collectives that DeepSpeed 0.19 calls; it would say so at every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if device.type == "cpu":
        # Otherwise a C++ build of about 90 s runs at the first start, and fails without a compiler (design 8.10).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend_name(device), timeout=timeout, verbose=False)


def close_distributed() -> None:
    """Leave the process group, if one was joined."""
    if _is_joined():
        torch_dist.destroy_process_group()


def gather_objects(value: Any) -> list[Any]:
    """The value of every rank, in rank order, on every rank; values must be picklable and small. A collective."""
    if not _is_joined() or world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank. A collective."""
    if not _is_joined() or world_size() == 1:
        return value
    values = [value]
    torch_dist.broadcast_object_list(values, src=0)
    return values[0]


def all_ranks_agree(value: Any) -> bool:
    """Whether every rank has an equal value (a config's hash, a data fingerprint). A collective."""
    values = gather_objects(value)
    return all(other == values[0] for other in values)


def raise_together(error: Exception | None) -> None:
    """Raise on every rank as soon as one rank has an error; nothing where none has. A collective.

    All ranks raise the same: the error of the first rank that has one, `ArcError` where its class is none of ours.
    Where not all ranks have found it, the message begins with that rank's number.
    """
    cls = type(error) if isinstance(error, ArcError) else ArcError
    found = gather_objects(None if error is None else (cls, str(error)))
    first = next((number for number, failure in enumerate(found) if failure is not None), None)
    if first is None:
        return
    if error is not None and all(failure == found[first] for failure in found):
        raise error
    cls, message = found[first]
    raise cls(f"rank {first}: {message}") from error


@contextmanager
def fail_together() -> Iterator[None]:
    """Run a block in which a rank may find a user's mistake (an `ArcError`): it then fails on all ranks at once.

    The block holds no collective. Every rank enters it the same number of times. Other exceptions pass through as
    they are: the launcher ends the remaining ranks.
    """
    error: ArcError | None = None
    try:
        yield
    except ArcError as caught:
        error = caught
    raise_together(error)


class RankFilter(logging.Filter):
    """Lets rank 0 speak, and every rank warn; adds `rank` to each record."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.__dict__["rank"] = number = rank()
        return number == 0 or record.levelno >= logging.WARNING


class _WithoutPhrase(logging.Filter):
    """Drops the records that hold a phrase."""

    def __init__(self, phrase: str) -> None:
        super().__init__()
        self._phrase = phrase

    def filter(self, record: logging.LogRecord) -> bool:
        return self._phrase not in record.getMessage()


def setup_logging(level: int = logging.INFO) -> None:
    """Send log records to stderr, one line each, through `RankFilter`. Calling it again changes the level only."""
    root = logging.getLogger()
    root.setLevel(level)
    logging.getLogger("DeepSpeed").setLevel(max(level, logging.WARNING))
    for logger_name, phrase in _CHATTER:
        chatty = logging.getLogger(logger_name)
        if not any(isinstance(f, _WithoutPhrase) for f in chatty.filters):
            chatty.addFilter(_WithoutPhrase(phrase))
    if any(isinstance(f, RankFilter) for handler in root.handlers for f in handler.filters):
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(RankFilter())
    pattern = "%(asctime)s [%(rank)d] %(levelname)s %(name)s: %(message)s"
    handler.setFormatter(logging.Formatter(pattern, datefmt="%H:%M:%S"))
    root.addHandler(handler)


def free_port() -> int:
    """A TCP port that is free on this host now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_joined() -> bool:
    return torch_dist.is_available() and torch_dist.is_initialized()

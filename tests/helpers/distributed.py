"""Ranks for tests: forks of one process that has imported DeepSpeed, which takes seconds. They stay up for the session.

    results = run_on_ranks(function, *arguments)          # two gloo ranks on CPU

`function` runs on every rank with the same arguments and must be importable by name (a module-level function of a test
file is); arguments and results are pickled. The list of results is in rank order. An error of a rank becomes a
`RankError` here, with that rank's traceback. Ranks that do not answer within the limit are a failure that shows their
stacks. After a hang or a death the ranks are started afresh at the next call.
"""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

from arc_ds.system.dist import free_port
from tests.helpers.waiting import LIMIT_S

# After one rank has failed the others may be stuck in a collective with it: how long they may go on.
GRACE_S = 10.0


class RankError(AssertionError):
    """A function failed on some ranks; the message carries their tracebacks or stacks."""


class RankPool:
    """`num_ranks` processes joined by gloo; `run` hands each of them the same call."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._stacks = Path(tempfile.mkdtemp(prefix="arc_ds_ranks_"))
        context = _fork_context()
        port = free_port()
        self._processes = []
        self._pipes: list[Connection] = []
        for rank in range(num_ranks):
            here, there = context.Pipe()
            arguments = (there, rank, num_ranks, port, str(self._stack_file(rank)))
            process = context.Process(target=_serve, args=arguments, daemon=True, name=f"rank{rank}")
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def _stack_file(self, rank: int) -> Path:
        return self._stacks / f"rank{rank}.txt"

    @property
    def alive(self) -> bool:
        return bool(self._processes) and all(process.is_alive() for process in self._processes)

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float) -> list[Any]:
        """One call on every rank; see the module. A failed pool is closed unless all ranks have answered."""
        payload = pickle.dumps((sys.path, os.getcwd(), pickle.dumps((function, args))))
        for pipe in self._pipes:
            with suppress(BrokenPipeError):
                pipe.send_bytes(payload)
        answers = self._collect(timeout_s)
        failures = [f"--- rank {rank} ---\n{text}" for rank, (ok, text) in sorted(answers.items()) if not ok]
        missing = [rank for rank in range(self.num_ranks) if rank not in answers]
        if missing:
            failures += [self._explain_silence(rank) for rank in missing]
            self.close()
        if failures:
            raise RankError(f"{function.__module__}.{function.__qualname__} failed on a rank\n" + "\n".join(failures))
        return [answers[rank][1] for rank in range(self.num_ranks)]

    def _collect(self, timeout_s: float) -> dict[int, tuple[bool, Any]]:
        """The answers that come in time: rank → (returned, result or traceback)."""
        answers: dict[int, tuple[bool, Any]] = {}
        waiting = dict(zip(self._pipes, range(self.num_ranks), strict=True))
        deadline = time.monotonic() + timeout_s
        while waiting and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(list(waiting), timeout=left):
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):  # it has ended, or is about to
                    self._processes[rank].join(LIMIT_S)
                if not answers.get(rank, (False, ""))[0]:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        return answers

    def _explain_silence(self, rank: int) -> str:
        process = self._processes[rank]
        if not process.is_alive():
            return f"--- rank {rank} ---\nended with exit code {process.exitcode}"
        os.kill(process.pid, signal.SIGUSR2)
        stacks = ""
        while not stacks or stacks != self._stack_file(rank).read_text():  # until it is whole
            stacks = self._stack_file(rank).read_text()
            time.sleep(0.5)
        return f"--- rank {rank} ---\ndid not answer; its stacks:\n{stacks}"

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(LIMIT_S)
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


def _fork_context() -> Any:
    """The context that starts ranks. Its server imports the modules of a run once and forks the ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.rank_server"])
    with mock.patch.dict(os.environ, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return context


_POOLS: dict[int, RankPool] = {}


def run_on_ranks(function: Callable[..., Any], *args: Any, num_ranks: int = 2, timeout_s: float = LIMIT_S) -> list[Any]:
    """`function(*args)` on each of `num_ranks` ranks; the results in rank order. See the module."""
    pool = _POOLS.get(num_ranks)
    if pool is None or not pool.alive:
        if pool is not None:
            pool.close()
        pool = _POOLS[num_ranks] = RankPool(num_ranks)
    return pool.run(function, *args, timeout_s=timeout_s)


@atexit.register
def close_pools() -> None:
    """End all ranks; the session's end does it by itself."""
    for pool in _POOLS.values():
        pool.close()
    _POOLS.clear()


def _serve(pipe: Connection, rank: int, num_ranks: int, port: int, stack_file: str) -> None:
    """A rank's life: join the group, then run what comes until the pipe closes."""
    from arc_ds.system.processes import die_with_parent

    die_with_parent()
    stacks = open(stack_file, "w")  # noqa: SIM115 - open as long as the process lives
    faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
    _join_group(rank, num_ranks, port)
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send_bytes(_answer(message))


def _answer(message: bytes) -> bytes:
    try:
        # The path first: the function is found by its module's name.
        sys.path[:], folder, call = pickle.loads(message)
        os.chdir(folder)
        function, args = pickle.loads(call)
        return pickle.dumps((True, function(*args)))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))


def _join_group(rank: int, num_ranks: int, port: int) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    place["LOCAL_SIZE"] = num_ranks  # otherwise DeepSpeed starts a process in every reduction
    os.environ.update({name: str(value) for name, value in place.items()})
    import deepspeed
    import torch

    torch.set_num_threads(1)
    # Without this DeepSpeed compiles its shared-memory collectives at the first use: 90 s, and a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=120), verbose=False)

"""Guarantees of the rank pool for tests that run a function on two ranks."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.helpers import distributed
from tests.helpers.distributed import RankError, run_on_ranks
from tests.helpers.waiting import LIMIT_S, wait_for


def _sum_of_ranks(offset: int) -> int:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return int(total)


def _fail_on_rank_one() -> int:
    if dist.get_rank() == 1:
        raise RuntimeError("only rank one is unhappy")
    return dist.get_rank()


def _hang_on_rank_one(sign: Path) -> None:
    if dist.get_rank() == 1:
        sign.touch()
        time.sleep(3600)


def _die_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_in_rank_order_and_ranks_can_talk() -> None:
    assert run_on_ranks(_sum_of_ranks, 10) == [21, 21]


def test_a_failing_rank_is_named_and_the_pool_goes_on() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1.*only rank one is unhappy"):
        run_on_ranks(_fail_on_rank_one)
    assert run_on_ranks(_sum_of_ranks, 0) == [1, 1]


def test_a_rank_that_hangs_is_a_failure_with_its_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time stands still until the rank hangs. From then on, each look at the clock takes a second."""
    sign, seconds = tmp_path / "sign", itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(seconds) if sign.exists() else 0, sleep=time.sleep)
    monkeypatch.setattr(distributed, "time", clock)
    with pytest.raises(RankError, match=r"(?s)rank 1.*_hang_on_rank_one"):
        run_on_ranks(_hang_on_rank_one, sign, timeout_s=0.5)


ORPHANS = """
import os, signal, sys, threading, time
from pathlib import Path
from tests.distributed.test_rank_pool import _hang_on_rank_one
from tests.helpers import distributed

sign = Path(sys.argv[1])

def end():
    while not sign.exists():
        time.sleep(0.01)
    print(*(process.pid for process in distributed._POOLS[2]._processes), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=end).start()
distributed.run_on_ranks(_hang_on_rank_one, sign)
"""


def test_ranks_that_hang_end_when_the_tests_are_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ORPHANS, str(tmp_path / "sign")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S)
    ranks = [int(pid) for pid in killed.stdout.split()]
    assert killed.returncode == -signal.SIGKILL and len(ranks) == 2
    wait_for(lambda: not any(map(_runs, ranks)))


def _runs(pid: int) -> bool:
    with suppress(OSError):
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # empty when it waits to be reaped
    return False


def test_a_rank_that_dies_is_a_failure_with_its_exit_code() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1.*exit code -9"):
        run_on_ranks(_die_on_rank_one)

"""Guarantees of the rank pool for tests that run a function on two ranks."""

from __future__ import annotations

import itertools
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.helpers import distributed
from tests.helpers.distributed import RankError, run_on_ranks


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


def test_a_rank_that_dies_is_a_failure_with_its_exit_code() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1.*exit code -9"):
        run_on_ranks(_die_on_rank_one)

"""One rank's stop request becomes that of all ranks."""

from __future__ import annotations

import os
import signal

import torch.distributed as dist

from arc_ds.training.signals import StopRequest
from tests.helpers.distributed import run_on_ranks


def _signal_rank_one() -> tuple[bool, bool, str | None]:
    with StopRequest((signal.SIGUSR1,)) as stop:
        before = stop.agreed()
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return before, stop.agreed(), stop.received


def test_a_signal_to_one_rank_stops_all_at_the_same_step() -> None:
    assert run_on_ranks(_signal_rank_one) == [(False, True, None), (False, True, "SIGUSR1")]

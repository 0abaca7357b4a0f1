"""The surroundings that `tests/conftest.py` makes for all tests."""

from __future__ import annotations

import os

import torch


def test_the_test_process_has_the_threads_that_its_programs_get() -> None:
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])

"""Hosts that were told different things, or that found different files, are one error before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from arc_ds import dist
from arc_ds.config.load import load_config
from arc_ds.errors import ConfigError
from arc_ds.training.build import read_parts
from tests.helpers.distributed import run_on_ranks
from tests.helpers.tiny_run import write_inputs

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def _read(path: str, overrides_of_rank: Sequence[Sequence[str]]) -> str:
    """The error that this rank gets, empty where it gets none."""
    overrides = overrides_of_rank[dist.rank()]
    try:
        read_parts(load_config(path, [*overrides, f"run_dir=run_of_{dist.rank()}"]), torch.device("cpu"))
    except ConfigError as error:
        return str(error)
    return ""


def test_equal_hosts_with_other_paths_are_fine(config: Path) -> None:
    assert run_on_ranks(_read, str(config), [[], []]) == ["", ""]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("steps=7", "steps"),
        ("optimizer.encoder_lr=7e-7", "optimizer"),
        ("seed=9", "seed"),
        ("encoder.num_layers=1", "encoder's and bridges' sizes"),
        ("decoders.0.placement=zero3", "decoders"),
    ],
)
def test_a_host_that_was_told_something_else_stops_all(config: Path, override: str, named: str) -> None:
    first, second = run_on_ranks(_read, str(config), [[], [override]])
    assert first == second and named in first and "every host the same" in first

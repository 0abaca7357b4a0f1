"""Different configs or files on hosts: all ranks raise the same error before anything is loaded."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch

from arc_ds.config.load import load_config
from arc_ds.errors import ConfigError
from arc_ds.system import dist
from arc_ds.training.build import read_parts
from tests.helpers.distributed import run_on_ranks

pytestmark = pytest.mark.distributed


def _read(path: str, overrides_of_rank: Sequence[Sequence[str]]) -> str:
    """Error message on this rank; empty if there is none."""
    overrides = overrides_of_rank[dist.rank()]
    try:
        read_parts(load_config(path, [*overrides, f"run_dir=run_of_{dist.rank()}"]), torch.device("cpu"))
    except ConfigError as error:
        return str(error)
    return ""


def test_equal_hosts_with_other_paths_are_fine(config: Path) -> None:
    assert run_on_ranks(_read, str(config), [[], []]) == ["", ""]


# Which keys hosts share is tested in tests/unit/config.
@pytest.mark.parametrize("override", ["seed=9", "decoders.0.placement=zero3", "data.sources.0.task=long_context"])
def test_a_host_that_was_told_something_else_stops_all(config: Path, override: str) -> None:
    first, second = run_on_ranks(_read, str(config), [[], [override]])
    assert first == second and f"{override.partition('=')[0]}: " in first and "Start every host with the same" in first


def _read_with(path: str, setting_of_rank: Sequence[str]) -> str:
    with mock.patch.dict(os.environ, NCCL_ALGO=setting_of_rank[dist.rank()]):
        return _read(path, [[], []])


def test_a_host_with_another_setting_of_collectives_stops_all(config: Path) -> None:
    first, second = run_on_ranks(_read_with, str(config), ["Ring", "Tree"])
    assert first == second
    host = socket.gethostname()
    assert f"NCCL_ALGO: Tree (rank 1 on {host}), but Ring (rank 0 on {host})" in first


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("decoders.0.backbone={}/copy", "weights of decoders.0.backbone"),
        ("data.sources.0.path={}/held_out", "shards"),
        ("data.validation={}/train", "held-out shards"),
        ("data.validation=null", "held-out shards"),
    ],
)
def test_a_host_that_found_other_files_stops_all(config: Path, override: str, named: str) -> None:
    copy, host = config.parent / "copy", socket.gethostname()
    if not copy.exists():
        shutil.copytree(config.parent / "wide", copy)
        weights = copy / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    first, second = run_on_ranks(
        _read, str(config), [["validation.every=0"], ["validation.every=0", override.format(config.parent)]]
    )
    assert first == second and first.startswith(f"the ranks do not agree. {named}: ")
    assert f"(rank 1 on {host}), but" in first and f"(rank 0 on {host}). Provide the same files" in first


def test_a_host_whose_manifests_count_other_passages_stops_all(config: Path) -> None:
    """The fingerprints are equal, but the ranks of that host would distribute samples differently."""
    counted = config.parent / "counted"
    shutil.copytree(config.parent / "train", counted, dirs_exist_ok=True)
    manifest = counted / "manifest.json"
    spec = json.loads(manifest.read_text())
    for shard in spec["shards"]:
        shard["passage_tokens"] = {"2": 7}
    manifest.write_text(json.dumps(spec))
    first, second = run_on_ranks(_read, str(config), [[], [f"data.sources.0.path={counted}"]])
    assert first == second and "passage counts in the shards' manifests" in first
    assert "shards: " not in first

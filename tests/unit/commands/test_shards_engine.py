"""The options that choose where the workers of `shards build` and `shards tokenize` run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pytest

from arc_ds.commands.shards.engine import add_engine, chosen_workers
from arc_ds.errors import ConfigError, DataError, StorageError
from arc_ds.shards.building.writer import build_shards
from arc_ds.shards.parallel import map_in_order
from arc_ds.system.processes import num_cores
from tests.helpers.tiny_data import write_tiktoken

WRONG_RAY = ["--engine", "ray", "--ray-address", "127.0.0.1:1"]


def parsed(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_engine(parser)
    return parser.parse_args(words)


def test_workers_are_the_cores_of_this_host_unless_given() -> None:
    for words, num_workers in (([], num_cores()), (["--workers", "3"], 3)):
        with chosen_workers(parsed(words)) as workers:
            assert workers == (num_workers, map_in_order)


def test_an_address_without_ray_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs --engine ray"), chosen_workers(parsed(["--ray-address", "auto"])):
        pass


def test_the_address_reaches_ray() -> None:
    pytest.importorskip("ray", reason="needs the extra ray")
    with chosen_workers(parsed(WRONG_RAY)) as (_, engine), pytest.raises(StorageError, match=r"at 127\.0\.0\.1:1"):
        next(engine(abs, [1], 1))


def test_an_error_in_the_inputs_comes_before_ray(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra ray")
    wide = tmp_path / "a.jsonl"
    wide.write_text('{"text": "The lamp."}', encoding="utf-16")
    tokenizer = write_tiktoken(tmp_path / "tokenizer.model")
    for name, message in (("b.jsonl", "b.jsonl is missing"), ("a.jsonl", "a.jsonl is UTF-16")):
        with chosen_workers(parsed(WRONG_RAY)) as workers, pytest.raises(DataError, match=message):
            build_shards([tmp_path / name], tmp_path / "out", tokenizer, **workers._asdict())

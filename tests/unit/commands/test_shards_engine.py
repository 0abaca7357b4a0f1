"""The options that choose where the workers of `shards build` and `shards tokenize` run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import pytest

from arc_ds.commands.shards.engine import add_engine, chosen_workers
from arc_ds.errors import ConfigError, StorageError
from arc_ds.shards.parallel import map_in_order
from arc_ds.system.processes import num_cores


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
    words = ["--engine", "ray", "--ray-address", "127.0.0.1:1"]
    with pytest.raises(StorageError, match=r"answers at 127\.0\.0\.1:1"), chosen_workers(parsed(words)):
        pass

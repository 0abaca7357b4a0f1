"""Placement "auto" of a frozen decoder: replicated if it fits, else sharded over as few ranks as possible."""

from __future__ import annotations

import pytest

from arc_ds.training.engine import choose_placement

GIB = 1 << 30


@pytest.mark.parametrize(
    ("decoder_gib", "free_gib", "world_size", "local_world_size", "expected"),
    [
        pytest.param(32, 80, 8, 8, "replicated", id="0.4 of the free memory"),
        pytest.param(32, 80, 16, 8, "replicated", id="on any number of hosts"),
        pytest.param(33, 80, 8, 8, "zero3", id="one host's ranks share it"),
        pytest.param(33, 80, 16, 8, "zero3+hpz", id="each host's ranks share a copy"),
        pytest.param(256, 80, 16, 8, "zero3+hpz", id="a host holds just one copy"),
        pytest.param(257, 80, 16, 8, "zero3", id="a host cannot hold a copy"),
        pytest.param(33, 80, 4, 1, "zero3", id="hosts of one rank have nothing to share"),
        pytest.param(33, 80, 12, 8, "zero3", id="hosts of unlike numbers of ranks"),
        pytest.param(60, 80, 1, 1, "replicated", id="one rank has no choice"),
        pytest.param(600, None, 16, 8, "replicated", id="memory that is not counted"),
    ],
)
def test_auto_follows_the_memory_and_the_hosts(
    decoder_gib: int, free_gib: int | None, world_size: int, local_world_size: int, expected: str
) -> None:
    free_bytes = None if free_gib is None else free_gib * GIB
    assert expected == choose_placement(
        "auto",
        decoder_bytes=decoder_gib * GIB,
        free_bytes=free_bytes,
        world_size=world_size,
        local_world_size=local_world_size,
    )


@pytest.mark.parametrize("choice", ["replicated", "zero3", "zero3+hpz"])
def test_a_choice_that_is_made_stays(choice: str) -> None:
    assert choose_placement(choice, decoder_bytes=60, free_bytes=8, world_size=2, local_world_size=1) == choice

"""Kept ports in a checkpoint: exact tensors, and the names of trained ports among them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arc_ds.checkpoints.kept_ports import name_in_export, read_kept_ports, write_kept_ports


def test_tensors_keep_dtype_and_bits(tmp_path: Path) -> None:
    third = torch.tensor([[1 / 3, -0.0, 1e-40]])
    tensors = {"ports.0.cont": third, "ports.1.cont": third.bfloat16(), "ports.1.rec": torch.ones(4, 2).T}
    assert read_kept_ports(tmp_path) == {}
    write_kept_ports(tmp_path, tensors)
    found = read_kept_ports(tmp_path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert torch.equal(found["ports.0.cont"].signbit(), third.signbit())


@pytest.mark.parametrize(
    ("name", "places", "expected"),
    [
        ("ports.0.bridge.layer1.weight", [2], "ports.2.bridge.layer1.weight"),
        ("ports.1.rec", [2, 0], "ports.0.rec"),
        ("ports.0.rec", None, "ports.0.rec"),
        ("bridge.layer1.weight", [2], "bridge.layer1.weight"),
        ("encoder.layers.0.attention.wq.weight", [2], "encoder.layers.0.attention.wq.weight"),
    ],
)
def test_trained_ports_are_renumbered(name: str, places: list[int] | None, expected: str) -> None:
    assert name_in_export(name, places) == expected

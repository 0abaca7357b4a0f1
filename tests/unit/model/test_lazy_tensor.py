"""Tensors in blocks: the writer's files are those of safetensors itself, and no block is larger than it must be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import save_file

from arc_ds.model.weights import lazy_tensor
from arc_ds.model.weights.lazy_tensor import LazyTensor, as_lazy, write_safetensors


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {f"layers.{n}.weight": torch.randn(n + 1, 7, generator=generator) for n in range(12)}
    made |= {"b": torch.randn(5, generator=generator).bfloat16(), "a": torch.randn(3, 3, generator=generator).half()}
    made |= {'n"é': torch.randn(2, generator=generator).double(), "empty": torch.empty(0, 4)}
    return made | {"number": torch.tensor(2.5)}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
@pytest.mark.parametrize("block", [4, 1 << 20])
def test_a_file_has_the_bytes_of_safetensors_own_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metadata: dict[str, str] | None, block: int
) -> None:
    monkeypatch.setattr(lazy_tensor, "_BLOCK_VALUES", block)
    save_file(tensors(), tmp_path / "theirs", metadata=metadata)
    digest = write_safetensors(tmp_path / "ours", {n: as_lazy(t) for n, t in tensors().items()}, metadata)
    written = (tmp_path / "ours").read_bytes()
    assert written == (tmp_path / "theirs").read_bytes()
    assert digest == xxhash.xxh3_128_hexdigest(written)
    changed = tensors() | {"b": tensors()["b"] + 1}
    assert write_safetensors(tmp_path / "other", {n: as_lazy(t) for n, t in changed.items()}, metadata) != digest


def test_blocks_are_bounded_and_hold_whole_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_tensor, "_BLOCK_VALUES", 10)
    values, reads = torch.arange(42.0), []

    def read(start: int, stop: int) -> torch.Tensor:
        reads.append((start, stop))
        return values[start:stop]

    tensor = LazyTensor(shape=(7, 6), dtype=torch.float32, read=read)
    assert torch.equal(tensor.whole(), values.reshape(7, 6))
    assert reads == [(0, 10), (10, 20), (20, 30), (30, 40), (40, 42)]
    reads.clear()
    flipped = tensor.map(lambda flat: flat.reshape(-1, 3).flip(1).reshape(-1), unit=3).map(torch.neg, unit=2)
    assert torch.equal(flipped.whole(), -values.reshape(-1, 3).flip(1).reshape(7, 6))
    assert reads == [(start, start + 6) for start in range(0, 42, 6)]
    assert flipped.to(torch.bfloat16).whole().dtype == torch.bfloat16

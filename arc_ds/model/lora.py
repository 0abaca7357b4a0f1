"""Low-rank adapters of an encoder: building, starting values, and merging them into its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from arc_ds.model.linear import Linear, LoraAdapter
from arc_ds.model.weights.lazy_tensor import LazyTensor, as_lazy

_A, _B = ".adapter.a", ".adapter.b"


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter."""
    return name.endswith((_A, _B))


def add_adapters(module: nn.Module, *, rank: int, scale: float) -> None:
    """Add an uninitialised adapter to every linear of a module. scale: alpha / rank."""
    for linear in [each for each in module.modules() if isinstance(each, Linear)]:
        linear.adapter = LoraAdapter(linear.in_features, linear.out_features, rank=rank, scale=scale)


def starting_adapter(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The starting values of an adapter's parameter: A is Kaiming-uniform with a = √5, B is zero.

    name: of an encoder's adapter or in `DecoderAdapters`.
    """
    if name.endswith((_B, "_b")):
        return torch.zeros(shape)
    return (torch.rand(shape, generator=generator) * 2 - 1) / shape[-1] ** 0.5


def merge_adapters(tensors: Mapping[str, Tensor | LazyTensor], scale: float) -> dict[str, Tensor | LazyTensor]:
    """The same tensors with each adapter added to its weight, W + scale * B A, and without the adapters.

    The sums are float32. They are computed when they are read, in blocks of rows.

    tensors: by their names in `Compressor`.
    scale: alpha / rank of the run.
    """
    merged = {name: tensor for name, tensor in tensors.items() if not is_adapter(name)}
    for name, tensor in tensors.items():
        if name.endswith(_A):
            prefix = name.removesuffix(_A)
            weight = f"{prefix}.weight"
            merged[weight] = _sum(as_lazy(merged[weight]), as_lazy(tensors[prefix + _B]), as_lazy(tensor), scale)
    return merged


def _sum(weight: LazyTensor, b: LazyTensor, a: LazyTensor, scale: float) -> LazyTensor:
    """W + scale * B A. Blocks are whole rows of W."""
    width = weight.shape[1]

    def read(start: int, stop: int) -> Tensor:
        rows_of_b = b.whole()[start // width : stop // width].float()
        return weight.read(start, stop).float() + scale * (rows_of_b @ a.whole().float()).flatten()

    return replace(weight, dtype=torch.float32, unit=math.lcm(weight.unit, width), read=read)

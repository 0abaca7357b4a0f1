"""Low-rank adapters of a frozen decoder, which belong to the trained port of the decoder.

The port gives them to the decoder as tensors before each pass, like the vectors. ZeRO-3 thus partitions them with the
compressor, and the decoder's own parameters stay frozen in every placement.

Shape letters: N layers, R rank, I and O input and output size of a linear.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arc_ds.model.backbone import Block
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.linear import GivenAdapter, Linear


@dataclass(frozen=True, kw_only=True)
class DecoderLora:
    """Sizes of the adapters of a decoder.

    rank: rows of A and columns of B.
    scale: alpha / rank.
    num_layers: number of the decoder's layers.
    linears: name, input size and output size of each linear of a layer.
    """

    rank: int
    scale: float
    num_layers: int
    linears: tuple[tuple[str, int, int], ...]

    @staticmethod
    def of(config: BackboneConfig, *, rank: int, scale: float) -> DecoderLora:
        """Adapters on all linears of the layers of a decoder."""
        with torch.device("meta"):
            linears = _linears(Block(config))
        sizes = tuple((name, linear.in_features, linear.out_features) for name, linear in linears.items())
        return DecoderLora(rank=rank, scale=scale, num_layers=config.num_layers, linears=sizes)

    @staticmethod
    def from_json(plain: dict[str, Any]) -> DecoderLora:
        """Read `dataclasses.asdict` of the sizes. Raises TypeError or ValueError if it is none."""
        linears = tuple((str(name), int(in_size), int(out_size)) for name, in_size, out_size in plain["linears"])
        return DecoderLora(**{**plain, "linears": linears})


class DecoderAdapters(nn.Module):
    """The trained adapters of one decoder: A [N, R, I] and B [N, O, R] of each linear. Uninitialised."""

    def __init__(self, spec: DecoderLora) -> None:
        super().__init__()
        self.spec = spec
        for name, in_size, out_size in spec.linears:
            self.register_parameter(f"{name}_a", nn.Parameter(torch.empty(spec.num_layers, spec.rank, in_size)))
            self.register_parameter(f"{name}_b", nn.Parameter(torch.empty(spec.num_layers, out_size, spec.rank)))

    def forward(self) -> tuple[Tensor, ...]:
        """Copies of A and B of each linear. A view would keep the tensors that ZeRO-3 has gathered."""
        return tuple(parameter.clone() for parameter in self.parameters())


def give_adapters(layers: Iterable[nn.Module], spec: DecoderLora, tensors: Sequence[Tensor]) -> None:
    """Let the layers of a decoder add adapters to their linears. tensors: from `DecoderAdapters`."""
    by_layer = zip(*(tensor.unbind(0) for tensor in tensors), strict=True)
    for layer, of_layer in zip(layers, by_layer, strict=True):
        linears = _linears(layer)
        for (name, _, _), a_RI, b_OR in zip(spec.linears, of_layer[::2], of_layer[1::2], strict=True):
            linears[name].adapter = GivenAdapter(a_RI, b_OR, spec.scale)


@torch.no_grad()
def drop_adapters(layers: Iterable[nn.Module], *, merged: bool) -> None:
    """Let the layers of a decoder compute without adapters.

    merged: add the adapters to the weights first, W + scale * B A, summed in float32.
    """
    for linear in (linear for layer in layers for linear in _linears(layer).values()):
        given, linear.adapter = linear.adapter, None
        if merged and given is not None:
            product = given.scale * given.b.float() @ given.a.float()
            linear.weight.copy_(linear.weight.float() + product)


def _linears(layer: nn.Module) -> dict[str, Linear]:
    """The linears of a layer by the last part of their names."""
    return {name.rpartition(".")[2]: part for name, part in layer.named_modules() if isinstance(part, Linear)}

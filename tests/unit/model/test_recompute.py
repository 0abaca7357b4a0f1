"""Memory and operations of selective recomputation, between those of no recomputation and of whole layers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from arc_ds.batch.groups import GroupRule
from arc_ds.batch.packing import PoolingSpec, pack
from arc_ds.model.backbone import Recompute
from tests.helpers.tiny_compressor import TINY, sample, tiny_compressor, tiny_decoder

POOLING = PoolingSpec((GroupRule("factor", 4),))
NUM_ROWS = 12


class _Products(TorchDispatchMode):
    """Counts the operations of matrix products with weights."""

    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default):
            first, second = args[-2:]
            self.operations += 2 * first.shape[0] * first.shape[1] * second.shape[1]
        return func(*args, **(kwargs or {}))


def _cost(kind: str, recompute: Recompute) -> tuple[int, Counter[int], int]:
    """(operations of matrix products in backward, number of kept tensors by width, kept values)."""
    if kind == "encoder":
        model = tiny_compressor(activation_checkpointing=recompute).encoder
        batch, inputs = pack([sample(-NUM_ROWS)], POOLING), ()
    else:
        model = tiny_decoder(activation_checkpointing=recompute)
        batch = pack([sample(-4, NUM_ROWS - 1)], PoolingSpec(()))
        inputs = (torch.randn(batch.compressed_rows.numel(), 12, dtype=torch.float64, requires_grad=True),)
    kept: dict[int, Tensor] = {}
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in owned and tensor.is_floating_point():
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(batch, *inputs)
    with _Products() as products:
        out.sum().backward()
    widths = Counter(tensor.shape[-1] for tensor in kept.values())
    return products.operations, widths, sum(tensor.numel() for tensor in kept.values())


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_selective_keeps_less_than_none_and_more_than_full(kind: str) -> None:
    values = [_cost(kind, recompute)[2] for recompute in ("none", "selective", "full")]
    assert values[0] > 1.2 * values[1] > 1.2 * 1.2 * values[2], values


def test_a_trained_layer_repeats_no_matrix_product() -> None:
    none, selective, full = (_cost("encoder", recompute)[0] for recompute in ("none", "selective", "full"))
    assert none == selective < full


def test_a_frozen_layer_repeats_two_products_and_keeps_neither() -> None:
    none, selective, full = (_cost("decoder", recompute) for recompute in ("none", "selective", "full"))
    width, ffn, layers = 12, TINY.ffn_size, TINY.num_layers
    rows = (selective[0] - none[0]) // (2 * 2 * width * ffn * layers)
    assert rows > 0 and selective[0] - none[0] == rows * 2 * 2 * width * ffn * layers
    assert selective[0] < full[0]
    assert none[1][ffn] >= 2 * layers and selective[1][ffn] == 0

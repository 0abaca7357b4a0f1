"""Low-rank adapters: they start as zero, and merging them gives the same forward."""

from __future__ import annotations

import torch
from torch import nn

from arc_ds.batch.groups import GroupRule
from arc_ds.batch.packing import PoolingSpec, pack
from arc_ds.model.linear import Linear
from arc_ds.model.lora import add_adapters, is_adapter, merge_adapters, starting_adapter
from arc_ds.model.spec import LoraSpec
from arc_ds.model.weights.lazy_tensor import as_lazy
from tests.helpers.tiny_compressor import sample, tiny_compressor

SPEC = PoolingSpec((GroupRule("factor", 4),))
LORA = LoraSpec(rank=3, scale=0.5)


def test_merged_weights_give_the_same_vectors_and_have_an_ordinary_encoders_names() -> None:
    adapted = tiny_compressor(lora=LORA)
    adapters = [name for name, _ in adapted.named_parameters() if is_adapter(name)]
    assert len(adapters) == 2 * 7 * len(adapted.encoder.layers)
    ordinary, untouched = tiny_compressor(), tiny_compressor()
    merged = merge_adapters(dict(adapted.named_parameters()), LORA.scale)
    assert merged.keys() == dict(ordinary.named_parameters()).keys()
    for name, parameter in ordinary.named_parameters():
        parameter.data.copy_(as_lazy(merged[name]).whole())
    untouched.load_state_dict({k: v for k, v in adapted.state_dict().items() if not is_adapter(k)})
    batch = pack([sample(-9), sample(-4, seed=1)], SPEC)
    found = adapted(batch)
    # The sum is float32, and the model is float64.
    assert (found - ordinary(batch)).norm() < 1e-6 * found.norm()
    assert (found - untouched(batch)).abs().max() > 1e-2


def test_gradients_of_adapters_are_those_of_their_product() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = Linear(5, 7)
    add_adapters(nn.ModuleList([linear]), rank=2, scale=0.25)
    assert linear.adapter is not None
    for parameter in linear.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    linear.weight.requires_grad_(False)
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad(
        (x @ (linear.weight + 0.25 * linear.adapter.b @ linear.adapter.a).T * y).sum(),
        [x, linear.adapter.a, linear.adapter.b],
    )
    found = torch.autograd.grad((linear(x) * y).sum(), [x, linear.adapter.a, linear.adapter.b])
    for one, other in zip(found, wanted, strict=True):
        assert other.abs().max() > 1e-2 and torch.allclose(one, other, rtol=0, atol=1e-13)


def test_a_fresh_adapter_changes_nothing_and_its_first_gradient_is_that_of_b() -> None:
    compressor, plain = tiny_compressor(lora=LORA), tiny_compressor()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in compressor.named_parameters():
        if is_adapter(name):
            parameter.data = starting_adapter(name, tuple(parameter.shape), generator).double()
    plain.load_state_dict({k: v for k, v in compressor.state_dict().items() if not is_adapter(k)})
    batch = pack([sample(-9)], SPEC)
    vectors = compressor(batch)
    assert torch.equal(vectors, plain(batch))
    vectors.square().sum().backward()
    adapter = compressor.encoder.layers[0].attention.wq.adapter
    assert isinstance(adapter, nn.Module)
    bound = adapter.a.shape[1] ** -0.5
    assert 0.9 * bound < adapter.a.abs().max() <= bound and adapter.a.grad.abs().max() == 0 < adapter.b.grad.abs().max()


def test_blocks_of_a_merged_weight_are_its_whole_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator)
        for name, shape in (("w.weight", (6, 4)), ("w.adapter.a", (2, 4)), ("w.adapter.b", (6, 2)), ("bridge", (3,)))
    }
    merged = merge_adapters(tensors, 2.0)
    weight = as_lazy(merged["w.weight"])
    assert merged.keys() == {"w.weight", "bridge"} and merged["bridge"] is tensors["bridge"]
    wanted = tensors["w.weight"] + 2.0 * tensors["w.adapter.b"] @ tensors["w.adapter.a"]
    assert (weight.unit, weight.dtype) == (4, torch.float32)
    assert torch.allclose(weight.read(8, 16), wanted[2:4].flatten(), rtol=0, atol=1e-6)

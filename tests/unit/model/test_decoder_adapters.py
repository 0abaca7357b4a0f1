"""Adapters of a decoder: losses and gradients are those of the sum of its weights and their products."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from arc_ds.batch.groups import GroupRule
from arc_ds.batch.packing import PackedBatch, PoolingSpec, pack
from arc_ds.model.backbone import Recompute
from arc_ds.model.compressor import connect_adapters
from arc_ds.model.decoder import Decoder
from arc_ds.model.decoder_adapters import DecoderAdapters, DecoderLora
from arc_ds.model.linear import Linear
from arc_ds.model.lora import starting_adapter
from arc_ds.model.spec import CompressorSpec
from arc_ds.training.engine import PlacedDecoder
from tests.helpers.tiny_compressor import MANY_PARTS, OUTPUT_NORMED, TINY, fill, sample, tiny_compressor, tiny_decoder

EXACT = 1e-13  # of a tensor's norm
SPEC = PoolingSpec((GroupRule("factor", 4),))
BATCH = pack([sample(3, -9, 4), sample(-5, 3, seed=1), sample(4, seed=2), sample(1, -2, 3, -1, 2, seed=3)], SPEC)
SCALE = 0.5


def _adapters(decoder: Decoder) -> DecoderAdapters:
    return fill(DecoderAdapters(DecoderLora.of(decoder.config, rank=2, scale=SCALE)), 3)


def _vectors() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(BATCH.compressed_rows.numel(), 12, generator=generator, dtype=torch.float64).requires_grad_()


def _sums(decoder: Decoder, adapters: DecoderAdapters) -> dict[str, Tensor]:
    """W + scale * B A of each linear, by the name of its weight."""
    return {
        f"layers.{idx}.{name}.weight": linear.weight
        + SCALE * (getattr(adapters, f"{leaf}_b")[idx] @ getattr(adapters, f"{leaf}_a")[idx])
        for idx, layer in enumerate(decoder.layers)
        for name, linear in layer.named_modules()
        if isinstance(linear, Linear)
        for leaf in [name.split(".")[-1]]
    }


def _gradients(nll: Tensor, z: Tensor, adapters: DecoderAdapters) -> list[Tensor]:
    return [nll.detach(), *torch.autograd.grad(nll.sum(), [z, *adapters.parameters()])]


def _adapted(decoder: Decoder, adapters: DecoderAdapters, batch: PackedBatch = BATCH) -> list[Tensor]:
    decoder.use_adapters(adapters.spec, adapters())
    z = _vectors()
    return _gradients(decoder(batch, z), z, adapters)


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("parts", [{}, OUTPUT_NORMED, MANY_PARTS], ids=["llama", "output norms", "many parts"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_loss_and_gradients_are_those_of_the_summed_weights(recompute: Recompute, parts: dict[str, Any]) -> None:
    decoder = tiny_decoder(**parts, activation_checkpointing=recompute)
    before = {name: parameter.clone() for name, parameter in decoder.named_parameters()}
    adapters, z = _adapters(decoder), _vectors()
    found = _adapted(decoder, adapters)
    plain, whole = tiny_decoder(**parts), dataclasses.replace(BATCH, prefix=None)
    summed = functional_call(plain, _sums(plain, adapters), (whole, z))
    wanted = _gradients(summed, z, adapters)
    for one, other in zip(found, wanted, strict=True):
        assert other.abs().max() > 1e-3 and _distance(one, other) < EXACT
    assert (found[0] - plain(BATCH, z)).abs().max() > 1e-2
    assert all(torch.equal(parameter, before[name]) for name, parameter in decoder.named_parameters())
    decoder.is_adapted = False  # the wrong variant: rows before the vectors get no gradient
    z = _vectors()
    without_prefix = _gradients(decoder(BATCH, z), z, adapters)
    assert _distance(without_prefix[0], wanted[0]) < EXACT
    assert max(map(_distance, without_prefix[2:], wanted[2:])) > 1e-3


def test_fresh_adapters_change_no_bit_and_text_alone_has_none() -> None:
    decoder, generator, z = tiny_decoder(), torch.Generator().manual_seed(0), _vectors()
    whole = dataclasses.replace(BATCH, prefix=None)
    frozen = decoder(whole, z)
    adapters = _adapters(decoder)
    for name, parameter in adapters.named_parameters():
        parameter.data = starting_adapter(name, tuple(parameter.shape), generator).double()
    nll, of_z, *of_adapters = _adapted(decoder, adapters, whole)
    assert torch.equal(nll, frozen) and torch.equal(of_z, torch.autograd.grad(frozen.sum(), z)[0])
    for (name, parameter), grad in zip(adapters.named_parameters(), of_adapters, strict=True):
        assert bool(grad.any()) == name.endswith("_b") != bool(parameter.any()), name
    fill(adapters, 4)
    assert not torch.equal(_adapted(decoder, adapters, whole)[0], frozen)
    text = pack([sample(4, seed=2)], PoolingSpec(()))
    alone = PlacedDecoder(module=decoder)(text, None)  # validation's bounds
    assert torch.equal(alone, tiny_decoder()(text, None)) and not decoder.is_adapted


def test_merged_weights_are_the_sums_and_need_no_adapters() -> None:
    decoder = tiny_decoder()
    adapters = _adapters(decoder)
    expected, sums = _adapted(decoder, adapters)[0], _sums(decoder, adapters)
    decoder.use_no_adapters(merged=True)
    assert not decoder.is_adapted and decoder.layers[0].attention.wq.adapter is None
    for name, weight in sums.items():
        assert torch.allclose(decoder.get_parameter(name), weight, rtol=0, atol=1e-6), name  # the sums are float32
    assert (decoder(BATCH, _vectors()) - expected).abs().max() < 1e-4


def test_a_port_gives_its_adapters_to_its_decoder_and_an_idle_one_gets_zero_gradients() -> None:
    decoders = [tiny_decoder(), tiny_decoder(seed=2)]
    lora = DecoderLora.of(decoders[0].config, rank=2, scale=SCALE)
    compressor = tiny_compressor(decoder_sizes=(12, 12), adapters=(lora, lora))
    connect_adapters(compressor.ports, decoders)
    decoders[1](BATCH, compressor(BATCH, 1)).sum().backward()
    for idx, port in enumerate(compressor.ports):
        for name, parameter in port.adapters.named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.any()) == (idx == 1), (idx, name)
    assert [decoder.is_adapted for decoder in decoders] == [False, True]


def test_a_description_keeps_the_adapters_and_is_as_before_without_any() -> None:
    lora = DecoderLora.of(tiny_decoder().config, rank=2, scale=SCALE)
    spec = CompressorSpec(backbone=TINY, num_layers=2, decoder_sizes=(12, 10))
    adapted = spec.with_ports([(12, lora), (10, None)])
    assert CompressorSpec.from_json(adapted.to_json()) == adapted != spec
    assert "adapters" not in spec.to_json() and adapted.with_ports([(12, None), (10, None)]) == spec

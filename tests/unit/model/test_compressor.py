"""Ports: markers pass through the bridge after their context, and an idle port gets zero gradients."""

from __future__ import annotations

import pytest
import torch

from arc_ds.batch.groups import GroupRule
from arc_ds.batch.packing import PoolingSpec, pack
from arc_ds.batch.segments import Sample, Segment
from arc_ds.model.bridge import make_bridge
from arc_ds.model.compressor import DecoderPort
from tests.helpers.tiny_compressor import sample, tiny_compressor

SPEC = PoolingSpec((GroupRule("factor", 4),))


def test_vectors_are_groups_and_marker_of_each_context_through_the_bridge() -> None:
    compressor = tiny_compressor()
    port = compressor.ports[0]
    batch = pack([sample(2, -9, 1, -4, marker="rec"), sample(-3, seed=1)], SPEC)
    states = compressor.encoder(batch)
    rows = torch.cat((states[:3], port.rec, states[3:4], port.rec, states[4:], port.cont))
    assert torch.allclose(compressor(batch), port.bridge(rows), rtol=0, atol=1e-14)


def test_both_markers_may_stand_in_one_batch_and_each_gets_its_own_gradient() -> None:
    compressor = tiny_compressor()
    port = compressor.ports[0]
    batch = pack([sample(-4, marker="rec"), sample(-4, marker="cont"), sample(-4, marker=None)], SPEC)
    z = compressor(batch)
    assert z.shape[0] == 2 + 2 + 1
    towards = torch.zeros_like(z)
    towards[1] = 1.0  # the marker of the first context
    (z * towards).sum().backward()
    assert port.rec.grad.abs().max() > 0 and not port.cont.grad.any()


@pytest.mark.parametrize("reading", [0, 1])
def test_the_idle_port_gets_a_gradient_of_exactly_zero_and_changes_nothing(reading: int) -> None:
    both = tiny_compressor(decoder_sizes=(12, 10))
    batch = pack([sample(3, -9, 2)], SPEC)
    z = both(batch, reading)
    assert z.shape[1] == (12, 10)[reading]
    assert torch.equal(z, both.ports[reading](both.encoder(batch), batch))
    z.square().sum().backward()
    for idx, port in enumerate(both.ports):
        for name, parameter in port.named_parameters():
            assert parameter.grad is not None, f"ports.{idx}.{name} is outside the graph"
            if idx != reading or name == "rec":
                assert not parameter.grad.any(), f"ports.{idx}.{name}"
            else:
                assert parameter.grad.abs().max() > 0, f"ports.{idx}.{name}"
    encoder_grads = [p.grad for p in both.encoder.parameters()]
    alone = tiny_compressor(decoder_sizes=(12, 10))
    alone.ports[reading](alone.encoder(batch), batch).square().sum().backward()
    assert all(torch.equal(g, p.grad) for g, p in zip(encoder_grads, alone.encoder.parameters(), strict=True))


def test_a_shared_bridge_gets_the_sum_of_the_gradients_of_its_uses() -> None:
    """The oracle has a bridge for each decoder, with equal weights."""
    shared, apart = tiny_compressor(decoder_sizes=(12, 12), bridge_shared=True), tiny_compressor(decoder_sizes=(12, 12))
    weights = dict(shared.state_dict())
    for name in [name for name in weights if name.startswith("bridge.")]:
        weights |= {f"ports.{n}.{name}": weights[name] for n in range(2)}
        del weights[name]
    apart.load_state_dict(weights)
    batch = pack([sample(3, -9, 2), sample(-5, marker="rec")], SPEC)
    towards = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64)
    for reading in range(2):
        z = shared(batch, reading)
        assert torch.equal(z, apart(batch, reading))
        for each in (shared, apart):
            (each(batch, reading) * towards).square().sum().backward()
    parts = [port.bridge.layer1.weight.grad for port in apart.ports]
    grad = shared.bridge.layer1.weight.grad
    assert torch.allclose(grad, parts[0] + parts[1], rtol=1e-12, atol=0)
    assert all((grad - part).abs().max() > 0.1 * grad.abs().max() for part in parts), "one use alone is not enough"
    for n in range(2):
        assert torch.equal(shared.ports[n].cont.grad, apart.ports[n].cont.grad) and shared.ports[n].cont.grad.any()


def test_a_shared_bridge_runs_once_in_a_step_and_reaches_the_marker_of_every_port() -> None:
    """ZeRO-3 gives wrong gradients to a module that runs twice in a forward."""
    shared = tiny_compressor(decoder_sizes=(12, 12, 12), bridge_shared=True)
    calls: list[int] = []
    shared.bridge.register_forward_hook(lambda *_: calls.append(1))
    shared(pack([sample(-9)], SPEC), 1).square().sum().backward()
    assert len(calls) == 1
    assert all(parameter.grad is not None for parameter in shared.parameters())
    assert [bool(port.cont.grad.any()) for port in shared.ports] == [False, True, False]


def test_a_shared_bridge_needs_equal_widths() -> None:
    with pytest.raises(ValueError, match="decoders of one width, but theirs are 12, 10"):
        tiny_compressor(decoder_sizes=(12, 10), bridge_shared=True)


def test_a_port_without_markers_and_a_batch_without_markers() -> None:
    compressor = tiny_compressor(markers=(), decoder_sizes=(12, 12))
    batch = pack([sample(-9, marker=None)], SPEC)
    z = compressor(batch, 1)
    assert z.shape == (3, 12) and not list(compressor.ports[0].markers)
    z.sum().backward()
    assert not compressor.ports[0].bridge.layer1.weight.grad.any()


@pytest.mark.parametrize("marker", ["cont", "rec"])
def test_a_port_with_one_marker_uses_it(marker: str) -> None:
    compressor = tiny_compressor(markers=(marker,))
    port = compressor.ports[0]
    assert port.markers == (marker,)
    z = compressor(pack([sample(-3, marker=marker)], SPEC))
    assert torch.allclose(z[-1:], port.bridge(getattr(port, marker)), rtol=0, atol=1e-14)


def test_markers_start_as_ones_in_encoder_width() -> None:
    port = DecoderPort(16, make_bridge("linear", 16, 12, None))
    assert torch.equal(port.cont, torch.ones(1, 16)) and torch.equal(port.rec, torch.ones(1, 16))


def test_a_decoder_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="decoder_idx is 1; the compressor has 1 ports"):
        tiny_compressor()(pack([sample(-3)], SPEC), 1)


def test_a_batch_without_contexts_gives_no_vectors_and_zero_gradients() -> None:
    compressor = tiny_compressor(decoder_sizes=(12, 12))
    z = compressor(pack([Sample("t", (Segment.text([1, 2]),))], SPEC), 0)
    assert z.shape == (0, 12)
    z.sum().backward()
    for name, parameter in compressor.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name

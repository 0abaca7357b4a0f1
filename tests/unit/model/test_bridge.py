"""Bridges: the function of each kind, and initialisation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from arc_ds.model.bridge import RMS_EPS, Bridge, init_bridge, make_bridge


def _started(kind: str, in_size: int, out_size: int, hidden_size: int | None, how: str = "kaiming") -> nn.Module:
    bridge = make_bridge(kind, in_size, out_size, hidden_size)  # type: ignore[arg-type]
    init_bridge(bridge, how, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    return bridge.double()


def test_mlp_is_two_linears_without_activation() -> None:
    bridge, z = _started("mlp", 6, 4, 10), _rows(5, 6)
    expected = z @ bridge.layer1.weight.T @ bridge.layer2.weight.T
    assert torch.allclose(bridge(z), expected, rtol=0, atol=1e-15)
    assert torch.allclose(bridge(-z), -bridge(z), rtol=0, atol=1e-15)
    assert [tuple(p.shape) for p in bridge.parameters()] == [(10, 6), (4, 10)]


def test_a_hidden_size_that_is_not_given_is_the_decoders_width() -> None:
    assert [tuple(p.shape) for p in make_bridge("mlp", 6, 4, None).parameters()] == [(4, 6), (4, 4)]


def test_linear_has_one_layer_whatever_the_hidden_size() -> None:
    bridge, z = _started("linear", 6, 4, 10), _rows(5, 6)
    assert [tuple(p.shape) for p in bridge.parameters()] == [(4, 6)]
    assert torch.equal(bridge(z), F.linear(z, bridge.layer1.weight))


def test_rms_norms_before_the_two_linears() -> None:
    bridge, z = _started("rms", 6, 4, 10), _rows(5, 6)
    bridge.norm.weight.data = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
    normed = F.rms_norm(z, (6,), bridge.norm.weight, RMS_EPS)
    expected = normed @ bridge.layer1.weight.T @ bridge.layer2.weight.T
    assert torch.allclose(bridge(z), expected, rtol=0, atol=1e-14)
    assert (bridge(z) - (z @ bridge.layer1.weight.T @ bridge.layer2.weight.T)).abs().max() > 0.01


def test_gelu_stands_between_two_linears_and_has_no_identity_start() -> None:
    bridge, z = _started("mlp_gelu", 6, 4, 10), _rows(5, 6)
    hidden = z @ bridge.layer1.weight.T
    expected = (hidden * (1 + torch.erf(hidden / 2**0.5)) / 2) @ bridge.layer2.weight.T
    assert torch.allclose(bridge(z), expected, rtol=0, atol=1e-14)
    assert (bridge(z) - hidden @ bridge.layer2.weight.T).abs().max() > 0.01
    with pytest.raises(ValueError, match="identity.*mlp_gelu"):
        _started("mlp_gelu", 6, 6, 6, "identity")


def test_none_leaves_vectors_as_they_are_and_needs_equal_widths() -> None:
    z = _rows(5, 6)
    assert torch.equal(make_bridge("none", 6, 6, None)(z), z)
    with pytest.raises(ValueError, match="the encoder has 6, the decoder 4"):
        make_bridge("none", 6, 4, None)


@pytest.mark.parametrize(("kind", "hidden_size"), [("mlp", None), ("mlp", 9), ("linear", None)])
def test_an_identity_start_changes_nothing(kind: str, hidden_size: int | None) -> None:
    z = _rows(5, 6)
    assert torch.equal(_started(kind, 6, 6, hidden_size, "identity")(z), z)


@pytest.mark.parametrize(("out_size", "hidden_size"), [(4, None), (6, 5), (8, 8)])
def test_an_identity_start_that_cannot_be_is_refused(out_size: int, hidden_size: int | None) -> None:
    with pytest.raises(ValueError, match="identity"):
        _started("mlp", 6, out_size, hidden_size, "identity")


def test_a_kaiming_start_is_torchs_default_for_linears() -> None:
    bridge = make_bridge("mlp", 64, 32, 128)
    assert isinstance(bridge, Bridge)
    init_bridge(bridge, "kaiming", torch.Generator().manual_seed(3))
    expected = torch.empty(128, 64)
    nn.init.kaiming_uniform_(expected, a=5**0.5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(bridge.layer1.weight, expected)
    assert bridge.layer2.weight.abs().max() <= 128**-0.5 < 1.02 * bridge.layer2.weight.abs().max()


def _rows(num_rows: int, width: int) -> torch.Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

"""Bridges: map the encoder's width to a decoder's width. Each decoder has one (paper, section 3)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arc_ds.model.backbone import RMSNorm
from arc_ds.model.linear import Linear

BridgeInit = Literal["kaiming", "identity"]
BridgeKind = Literal["mlp", "mlp_gelu", "linear", "rms", "none"]
RMS_EPS = 1e-5  # the released weights' value; not a setting


class Bridge(nn.Module):
    """A map from [Z, in_size] to [Z, out_size] without bias.

    kind: "mlp" (two linears), "mlp_gelu" (two linears with GELU between them), "linear" (one linear) or "rms" (RMSNorm,
        then two linears).
    hidden_size: width between the two linears; None for the decoder's width.
    """

    def __init__(self, kind: BridgeKind, in_size: int, out_size: int, hidden_size: int | None) -> None:
        super().__init__()
        hidden = out_size if hidden_size is None or kind == "linear" else hidden_size
        self.norm = RMSNorm(in_size, RMS_EPS) if kind == "rms" else None
        self.layer1 = Linear(in_size, hidden)
        self.layer2 = Linear(hidden, out_size) if kind != "linear" else None
        self.has_gelu = kind == "mlp_gelu"

    def forward(self, z_ZD: Tensor) -> Tensor:
        if self.norm is not None:
            z_ZD = self.norm(z_ZD)
        z_ZD = self.layer1(z_ZD)
        if self.layer2 is None:
            return z_ZD
        return self.layer2(F.gelu(z_ZD) if self.has_gelu else z_ZD)


def make_bridge(kind: BridgeKind, in_size: int, out_size: int, hidden_size: int | None) -> nn.Module:
    """Build a bridge of the given kind. Raises ValueError if the kind is "none" and the widths differ."""
    if kind != "none":
        return Bridge(kind, in_size, out_size, hidden_size)
    if in_size != out_size:
        raise ValueError(f"bridge 'none' needs equal widths; the encoder has {in_size}, the decoder {out_size}")
    return nn.Identity()


def init_bridge(bridge: nn.Module, how: BridgeInit, generator: torch.Generator | None) -> None:
    """Initialise a bridge: Kaiming-uniform with a = sqrt(5) (torch's default for linears), or the identity map.

    The identity map places encoder states in the decoder's embedding space. This helps if the encoder is built from the
    decoder's own backbone. Raises ValueError like `check_bridge_init`.
    """
    check_bridge_init(bridge, how)
    linears = [m for m in bridge.modules() if isinstance(m, Linear)]
    for norm in (m for m in bridge.modules() if isinstance(m, RMSNorm)):
        nn.init.ones_(norm.weight)
    for linear in linears:
        if how == "kaiming":
            nn.init.kaiming_uniform_(linear.weight, a=5**0.5, generator=generator)
        else:
            nn.init.eye_(linear.weight)


def check_bridge_init(bridge: nn.Module, how: BridgeInit) -> None:
    """Raise ValueError if the sizes do not allow this initialisation.

    The identity needs equal widths, a hidden size of at least that width, and no GELU. Reads sizes only, so the bridge
    may be on "meta".
    """
    linears = [m for m in bridge.modules() if isinstance(m, Linear)]
    if how == "identity" and isinstance(bridge, Bridge) and bridge.has_gelu:
        raise ValueError("bridge.init 'identity' is not possible with bridge.kind 'mlp_gelu': use 'kaiming'")
    if how == "identity" and linears:
        in_size, hidden_size, out_size = linears[0].in_features, linears[0].out_features, linears[-1].out_features
        if in_size != out_size or hidden_size < in_size:
            raise ValueError(
                f"bridge.init 'identity' needs equal widths and a hidden size of at least that; the bridge maps "
                f"{in_size} -> {hidden_size} -> {out_size}: use 'kaiming' or drop hidden_size"
            )

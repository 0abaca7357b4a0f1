"""Rotary angles: cosines and sines of positions, with the scalings of frequencies that long-context models use.

Shape letters: T rows, F rotated pairs of a head.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from arc_ds.model.backbone_config import BackboneConfig, RopeKind, RopeScaling

_BY_LENGTH: tuple[RopeKind, ...] = ("dynamic", "longrope")  # these scalings depend on the length of the sequence
_Scale = Callable[[Tensor, RopeScaling, float, Tensor | None], Tensor]


class Rope(NamedTuple):
    """Cosine and sine of each row's angles, float32 [rows, head_dim / 2] each.

    A scaling may multiply them by an attention factor, so cos² + sin² is not always 1. Pairs that do not rotate have
    cosine 1 and sine 0.

    query_factor: factor of the queries, float32 [rows, 1]; None for 1.
    """

    cos: Tensor
    sin: Tensor
    query_factor: Tensor | None = None

    @property
    def keys(self) -> tuple[Tensor, Tensor]:
        """The rotation of keys."""
        return self.cos, self.sin

    @property
    def queries(self) -> tuple[Tensor, Tensor]:
        """The rotation of queries."""
        if self.query_factor is None:
            return self.cos, self.sin
        return self.cos * self.query_factor, self.sin * self.query_factor


def ropes_at(positions_T: Tensor, config: BackboneConfig, lengths_T: Tensor | None) -> tuple[Rope, ...]:
    """Angles of each row in each layer. Layers with the same rule share one `Rope`.

    positions_T: position of each row in its sequence, int64.
    lengths_T: see `lengths_of_rows`.
    """
    rules = [_rule(config, layer_idx) for layer_idx in range(config.num_layers)]
    ropes = {rule: _rope(positions_T, config, *rule, lengths_T) for rule in dict.fromkeys(rules)}
    return tuple(ropes[rule] for rule in rules)


def lengths_of_rows(config: BackboneConfig, cu_rows: Tensor, cu_seqlens: Tensor, num_rows: int) -> Tensor | None:
    """Length of the whole sequence of each row, int64 [num_rows]; None if no angle depends on it.

    cu_rows: boundaries of the sequences among the rows, int32 [S + 1].
    cu_seqlens: boundaries of the same sequences with all their rows, int32 [S + 1]. For a cache, its capacity counts.
    """
    if not depends_on_length(config):
        return None
    return torch.repeat_interleave(cu_seqlens.long().diff(), cu_rows.long().diff(), output_size=num_rows)


def depends_on_length(config: BackboneConfig) -> bool:
    """Whether angles depend on the length of the sequence."""
    return config.rope_scaling is not None and config.rope_scaling.kind in _BY_LENGTH


def rope_frequencies(config: BackboneConfig, device: torch.device, lengths_T: Tensor | None = None) -> Tensor:
    """theta^(-2i / dim) of each rotated pair i, scaled if the config says so: float32 [F].

    dim is the number of rotated dimensions of a head, and F is half of it.

    lengths_T: see `lengths_of_rows`. If it is given, the result is [T, F] for scalings that depend on it. None:
        sequences of at most the original length.
    """
    dim = config.rotary_dim or config.head_dim
    exponents = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    freqs = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    return freqs if scaling is None else _SCALES[scaling.kind](freqs, scaling, config.rope_theta, lengths_T)


def _rule(config: BackboneConfig, layer_idx: int) -> tuple[bool, RopeScaling | None]:
    """Whether a layer rotates, and its scaling."""
    is_scaled = config.windowed_rope_scaling or config.window_of(layer_idx) is None
    return layer_idx not in config.layers_without_rope, config.rope_scaling if is_scaled else None


def _rope(
    positions_T: Tensor, config: BackboneConfig, rotates: bool, scaling: RopeScaling | None, lengths_T: Tensor | None
) -> Rope:
    num_pairs = config.head_dim // 2
    positions_T1 = positions_T.float()[:, None]
    query_factor = None if scaling is None else _query_factor(positions_T1, scaling)
    if not rotates:
        cos = positions_T1.new_ones(positions_T.numel(), num_pairs)
        return Rope(cos, torch.zeros_like(cos), query_factor)
    rotation = dataclasses.replace(config, rope_scaling=scaling)
    angles_TF = positions_T1 * rope_frequencies(rotation, positions_T.device, lengths_T)
    cos, sin = angles_TF.cos(), angles_TF.sin()
    if scaling is not None and scaling.attention_factor != 1.0:
        cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
    if angles_TF.shape[1] < num_pairs:
        unrotated = (0, num_pairs - angles_TF.shape[1])
        cos, sin = F.pad(cos, unrotated, value=1.0), F.pad(sin, unrotated, value=0.0)
    return Rope(cos, sin, query_factor)


def _query_factor(positions_T1: Tensor, scaling: RopeScaling) -> Tensor | None:
    if scaling.query_beta == 0.0:
        return None
    return 1.0 + scaling.query_beta * torch.log1p(torch.floor(positions_T1 / scaling.original_max_positions))


def _scale_linear(freqs_F: Tensor, scaling: RopeScaling, _theta: float, _lengths_T: Tensor | None) -> Tensor:
    """Divide all frequencies by the factor."""
    return freqs_F / scaling.factor


def _scale_llama3(freqs_F: Tensor, scaling: RopeScaling, _theta: float, _lengths_T: Tensor | None) -> Tensor:
    """Divide low frequencies by the factor, keep high ones and interpolate between them (Llama 3.1)."""
    wavelength = 2 * math.pi / freqs_F
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((scaling.original_max_positions / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return freqs_F * (kept + (1.0 - kept) / scaling.factor)


def _scale_yarn(freqs_F: Tensor, scaling: RopeScaling, theta: float, _lengths_T: Tensor | None) -> Tensor:
    """Like llama3, but the interpolation is linear in the index of the pair (YaRN, arXiv 2309.00071, section 3.2)."""
    dim = 2 * freqs_F.numel()

    def pair_with(rotations: float) -> float:
        """The pair, possibly fractional, that turns this often within the original length."""
        return dim * math.log(scaling.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first or 0.001
    pairs_F = torch.arange(freqs_F.numel(), device=freqs_F.device, dtype=torch.float32)
    divided = ((pairs_F - first) / width).clamp(0.0, 1.0)
    return freqs_F * (1.0 - divided) + freqs_F / scaling.factor * divided


def _scale_dynamic(freqs_F: Tensor, scaling: RopeScaling, _theta: float, lengths_T: Tensor | None) -> Tensor:
    """Enlarge the base of the frequencies with the length of the sequence ("dynamic NTK")."""
    if lengths_T is None:
        return freqs_F
    dim, original = 2 * freqs_F.numel(), scaling.original_max_positions
    growth_T = scaling.factor * lengths_T.clamp(min=original).float() / original - (scaling.factor - 1.0)
    exponents_F = torch.arange(0, dim, 2, device=freqs_F.device, dtype=torch.float32) / (dim - 2)
    return freqs_F * growth_T[:, None] ** -exponents_F


def _scale_longrope(freqs_F: Tensor, scaling: RopeScaling, _theta: float, lengths_T: Tensor | None) -> Tensor:
    """Divide each frequency by its own factor, which depends on whether the sequence is long (arXiv 2402.13753)."""
    short_F, long_F = (freqs_F.new_tensor(factors) for factors in (scaling.short_factors, scaling.long_factors))
    if lengths_T is None:
        return freqs_F / short_F
    return freqs_F / torch.where((lengths_T > scaling.original_max_positions)[:, None], long_F, short_F)


_SCALES: Mapping[RopeKind, _Scale] = {
    "linear": _scale_linear,
    "llama3": _scale_llama3,
    "yarn": _scale_yarn,
    "dynamic": _scale_dynamic,
    "longrope": _scale_longrope,
}

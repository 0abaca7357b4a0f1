"""Rotary angles: cosines and sines of positions, with or without the `llama3` scaling of frequencies."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from arc_ds.model.backbone_config import BackboneConfig, RopeScaling


class Rope(NamedTuple):
    """Cosine and sine of each row's angles, float32 [rows, head_dim / 2] each."""

    cos: Tensor
    sin: Tensor

    def at(self, rows: Tensor) -> Rope:
        """The angles of the given rows, int64 [n]."""
        return Rope(self.cos[rows], self.sin[rows])


def rope_frequencies(config: BackboneConfig, device: torch.device) -> Tensor:
    """theta^(-2i / head_dim) for i in 0 … head_dim / 2 - 1, scaled if the config says so: float32 [head_dim / 2]."""
    exponent = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    freqs = 1.0 / config.rope_theta**exponent
    return freqs if config.rope_scaling is None else _scale_llama3(freqs, config.rope_scaling)


def rope_at(positions: Tensor, config: BackboneConfig) -> Rope:
    """Angles of each row, position * frequency. `positions`: int64 [rows]."""
    angles = positions.float()[:, None] * rope_frequencies(config, positions.device)[None, :]
    return Rope(angles.cos(), angles.sin())


def _scale_llama3(freqs: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide low frequencies by the factor, keep high ones and interpolate between them (Llama 3.1)."""
    wavelength = 2 * math.pi / freqs
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((scaling.original_max_positions / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return freqs * (kept + (1.0 - kept) / scaling.factor)

"""A step of a tiny model with all Triton kernels against the same step in plain torch: loss and all gradients."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

import arc_kernels
from arc_ds.batch.packing import pack
from arc_ds.model.backbone import Recompute
from tests.helpers.plain_trainer import POOLING, decoder_of_step, samples_of_step, tiny_compressor, tiny_decoders
from tests.kernels.operators import RecordedOperators

TOLERANCE = 1e-5  # issue 3; each run rounds in float32 on its own
STEP, NUM_SEQUENCES = 4, 2

# The operators that the step must launch in forward and backward.
OPERATORS = {"attention", "norm", "rotary", "swiglu", "splice", "linear_cross_entropy"}
POOLING_OPERATORS = {"llama": "pool_norm", "olmo2": "group_pool", "many": "pool_norm"}  # OLMo 2 pools without a norm


def _loss_and_gradients(
    choice: Literal["triton", "reference"], device: torch.device, parts: str, *, activation_checkpointing: Recompute
) -> tuple[dict[str, Tensor], set[str]]:
    """{"loss": …, parameter name: gradient}, and the operators that ran."""
    decoder_idx = decoder_of_step(STEP)
    settings = {"activation_checkpointing": activation_checkpointing, "parts": parts}
    compressor = tiny_compressor(**settings).to(device)
    decoder = tiny_decoders(**settings)[decoder_idx].to(device)
    batch = pack(samples_of_step(STEP, NUM_SEQUENCES), POOLING).to(device)
    with arc_kernels.use(choice), RecordedOperators() as operators:
        loss = decoder(batch, compressor(batch, decoder_idx)).mean()
        loss.backward()
    gradients = {name: p.grad for name, p in compressor.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}, operators.names


@pytest.mark.parametrize(
    ("parts", "activation_checkpointing"),
    [("llama", "none"), ("llama", "full"), ("olmo2", "selective"), ("many", "full"), ("llama", "selective")],
)
def test_a_step_with_kernels_is_a_step_without(
    device: torch.device, parts: str, activation_checkpointing: Recompute
) -> None:
    wanted, none = _loss_and_gradients("reference", device, parts, activation_checkpointing=activation_checkpointing)
    found, launched = _loss_and_gradients("triton", device, parts, activation_checkpointing=activation_checkpointing)
    assert not none, none
    assert all(any(name.startswith(part) for name in launched) for part in {*OPERATORS, POOLING_OPERATORS[parts]}), (
        launched
    )
    assert sum(name.endswith("backward") for name in launched) >= 4, launched
    assert wanted.keys() == found.keys() and len(wanted) > 20
    for name, value in wanted.items():
        error, size = float((found[name] - value).norm()), float(value.norm())
        assert error <= TOLERANCE * size, (name, error, size)
    assert sum(float(value.norm()) > 0 for value in wanted.values()) > 20, "no gradient reached the encoder"

"""The traced memory of a plan against the tensors that the kernels really keep, on the CPU under the interpreter."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import arc_kernels as ak
from arc_ds.planning.pass_trace import PassTrace, batch_tensors, trace_pass

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from paper_step import TOY, build_models, make_batch

SIZE = replace(TOY, batch_size=1, prefix_tokens=4, context_tokens=8, continuation_tokens=4)


def _trace(device: str, kernels: str) -> PassTrace:
    compressor, decoder = build_models(SIZE, device=device, dtype=torch.float32)
    return trace_pass(compressor, decoder.requires_grad_(False), make_batch(SIZE).to(device), kernels=kernels)


def _kept_by_autograd() -> int:
    """Bytes of the storages that forward saves for backward, without parameters and the batch."""
    compressor, decoder = build_models(SIZE, device="cpu", dtype=torch.float32)
    decoder.requires_grad_(False)
    batch = make_batch(SIZE)
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with ak.use("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        nll_L = decoder(batch, compressor(batch))
    of_batch = {x.untyped_storage().data_ptr() for x in batch_tensors(batch)}
    return nll_L.nbytes + sum(x.untyped_storage().nbytes() for address, x in kept.items() if address not in of_batch)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares with kernels on the CPU")
def test_a_trace_without_values_has_the_memory_of_a_real_pass() -> None:
    planned, real = _trace("meta", "triton"), _trace("cpu", "triton")
    assert planned.saved == real.saved
    assert planned.peak_bytes == real.peak_bytes
    assert planned.product_flops == real.product_flops
    assert sum(planned.saved.values()) == _kept_by_autograd()
    # Plain torch keeps other tensors: a plan that traced them would be wrong by more than a tenth.
    assert sum(_trace("meta", "reference").saved.values()) > 1.1 * sum(real.saved.values())

"""The traced peak against the memory that torch's allocator reports for the same pass."""

from __future__ import annotations

import pytest
from torch.profiler import ProfilerActivity, profile

import arc_kernels as ak
from arc_ds.batch.groups import GroupRule
from arc_ds.batch.packing import PackedBatch, PoolingSpec, pack
from arc_ds.model.backbone import Recompute
from arc_ds.model.compressor import Compressor
from arc_ds.model.decoder import Decoder
from arc_ds.planning.pass_trace import drop_gradients, trace_pass
from tests.helpers.tiny_compressor import sample, tiny_compressor, tiny_decoder

PEAK = 0.10  # relative tolerance of the plan
LENGTHS = (96, -256, 160)


def _allocated_peak(compressor: Compressor, decoder: Decoder, batch: PackedBatch) -> int:
    """Most bytes that a pass holds at a time beyond what exists before it, those inside of torch's operations too."""
    drop_gradients(compressor)
    with ak.use("reference"), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        decoder(batch, compressor(batch)).sum().backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("level", ["none", "selective", "full"])
def test_the_traced_peak_is_that_of_the_allocator(level: Recompute) -> None:
    compressor = tiny_compressor(activation_checkpointing=level)
    decoder = tiny_decoder(activation_checkpointing=level).requires_grad_(False)
    batch = pack([sample(*LENGTHS), sample(*LENGTHS, seed=1)], PoolingSpec((GroupRule("factor", 4),)))
    traced = trace_pass(compressor, decoder, batch, kernels="reference").peak_bytes
    measured = _allocated_peak(compressor, decoder, batch)
    print(f"{level}: {traced:,} traced, {measured:,} allocated")
    assert traced == pytest.approx(measured, rel=PEAK)

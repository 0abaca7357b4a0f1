"""Deliberately wrong variants of golden cases. Each must clearly differ from the golden numbers.

Otherwise the parity tests would prove nothing. Their bound is 1e-5 of the largest value (`test_golden_model.py`). The
numbers that a variant affects differ by at least 1e-2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from arc_ds.batch.packing import PackedBatch, PoolLevel
from arc_ds.model.compressor import Compressor
from arc_ds.model.weights import permute_rotary
from tests.parity.golden import GoldenCase, build_case_compressor, pack_case
from tests.parity.golden_run import errors_of, run_case

FAR = 1e-2


def _full_groups_and_remainder(batch: PackedBatch) -> PackedBatch:
    """Groups of 8 plus a remainder instead of balanced groups."""
    sizes = []
    for length in batch.encoder_cu_seqlens.diff().tolist():
        sizes += [8] * (length // 8) + ([length % 8] if length % 8 else [])
    return _with_level(batch, group_cu=torch.tensor([0, *sizes]).cumsum(0).int())


def _positions_of_the_first_token(batch: PackedBatch) -> PackedBatch:
    """Pooled queries at the position of their group's first token instead of 0 … m-1."""
    (level,) = batch.levels
    starts = batch.encoder_cu_seqlens[:-1].repeat_interleave(level.cu_seqlens.diff())
    return _with_level(batch, positions=(level.group_cu[:-1] - starts).long())


def _context_after_the_next_token(batch: PackedBatch) -> PackedBatch:
    """Move the first context of the first sequence one token later (it is at the fourth row)."""
    first_rows = batch.compressed_rows[:4]
    assert first_rows.tolist() == [3, 4, 5, 6]
    text_rows, compressed_rows = batch.text_rows.clone(), batch.compressed_rows.clone()
    compressed_rows[:4] = first_rows + 1
    text_rows[3] = 3
    return dataclasses.replace(batch, text_rows=text_rows, compressed_rows=compressed_rows, label_rows=text_rows)


def _with_level(batch: PackedBatch, **changes: object) -> PackedBatch:
    (level,) = batch.levels
    changed: PoolLevel = dataclasses.replace(level, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(batch, levels=(changed,))


def _interleaved_rotary(compressor: Compressor) -> None:
    config = compressor.encoder.config
    for layer in compressor.encoder.layers:
        for linear, heads in ((layer.attention.wq, config.num_heads), (layer.attention.wk, config.num_kv_heads)):
            linear.weight.data = permute_rotary(linear.weight.data, heads, to="interleaved")


def _no_marker(compressor: Compressor) -> None:
    compressor.ports[0].cont.data.zero_()


def _other_marker(compressor: Compressor) -> None:
    port = compressor.ports[0]
    port.cont.data.copy_(port.rec.data)


def _pooled_keys(compressor: Compressor) -> None:
    layer = compressor.encoder.layers[-1]
    layer.layout = dataclasses.replace(layer.layout, pooled_queries=False)


def _pooled_between(compressor: Compressor) -> None:
    layer = compressor.encoder.layers[-1]
    layer.layout = dataclasses.replace(layer.layout, where="between")


def _causal(compressor: Compressor) -> None:
    compressor.encoder.causal = True


@pytest.mark.parametrize(
    "change", [_full_groups_and_remainder, _positions_of_the_first_token, _context_after_the_next_token]
)
def test_a_batch_laid_out_wrongly_is_noticed(golden: Path, change: Callable[[PackedBatch], PackedBatch]) -> None:
    case = GoldenCase.read(golden, "pq_mean_cr8")
    errors = errors_of(run_case(case, batch=change(pack_case(case))), case)
    assert min(errors["token_nll"], errors["grad.embedder.cont_tok.0.weight"]) > FAR


@pytest.mark.parametrize(
    "change", [_interleaved_rotary, _no_marker, _other_marker, _pooled_keys, _pooled_between, _causal]
)
def test_a_compressor_built_wrongly_is_noticed(golden: Path, change: Callable[[Compressor], None]) -> None:
    case = GoldenCase.read(golden, "pq_mean_cr8")
    compressor = build_case_compressor(case)
    change(compressor)
    errors = errors_of(run_case(case, compressor=compressor), case)
    assert min(errors["comp.bridged"], errors["token_nll"], errors["grad.enc.pooled"]) > FAR


def test_the_port_of_the_other_decoder_is_noticed(golden: Path) -> None:
    case = GoldenCase.read(golden, "multi_llm0")
    step = run_case(case, port_idx=1)
    assert (step.outputs["comp.bridged"] - case.tensors["comp.bridged"]).abs().max() > FAR
    assert step.gradients["ports.1.cont"].any() and not step.gradients["ports.0.cont"].any()


def test_a_loss_over_all_tokens_is_noticed(golden: Path) -> None:
    case = GoldenCase.read(golden, "pq_mean_cr8")
    unmasked = GoldenCase(
        case.root, case.name, case.meta, {**case.tensors, "in.y_mask": torch.ones_like(case.tensors["in.y_mask"])}
    )
    errors = errors_of(run_case(unmasked), case)
    assert errors["loss_masked"] > FAR and errors["grad.enc.pooled"] > FAR
    assert errors["logits"] < 1e-5


def test_compressed_vectors_in_reverse_order_are_noticed(golden: Path) -> None:
    case = GoldenCase.read(golden, "pq_mean_cr8")
    batch = pack_case(case)
    reversed_rows = dataclasses.replace(batch, compressed_rows=batch.compressed_rows.flip(0))
    errors = errors_of(run_case(case, batch=reversed_rows), case)
    assert errors["token_nll"] > FAR

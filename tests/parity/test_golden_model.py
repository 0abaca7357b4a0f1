"""Encoder, pooling, markers, bridges, splice, decoder, loss and all gradients against the golden files.

This file has all cases of the kinds forward_backward and end_to_end (with their token ids). `test_golden_decoder.py`
has the decoder_only cases, and `test_golden_variants.py` has deliberately wrong variants. Other parts use the remaining
golden folders: `gen_*` (generation), `train/*` (whole runs), `data/` and the texts of `e2e_*` (tasks and loaders),
`tables/{eval_prompts,eval_shuffle,metrics}` (evaluation), `tables/onecycle_lr` (schedule).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import arc_ds.model.encoder as encoder_module
from arc_ds.batch.packing import PoolLevel
from arc_ds.model.backbone import Spans
from arc_ds.model.pooling.base import ContextGrid, Pooling
from tests.parity.golden import GoldenCase, build_case_compressor, internal_name
from tests.parity.golden_run import errors_of, run_case

# Relative to the largest value of each tensor. Worst measured over all cases (float32, one thread): outputs 1.6e-6
# (logits of pq_mean_none), gradients 5.5e-6 (grad.enc.pooled of pq_mean_cr0), statistics of gradients 4.8e-6.
BOUND = 1e-5

CASES = [
    "between_last_cr4_causal",
    "between_mean_cr4",
    "between_pqmean_cr2_2",
    "bridge_linear",
    "bridge_mlp_nohidden",
    "dec_llama",
    "e2e_cont_interleave",
    "e2e_recon",
    "fusion_cr4",
    "last_cr4",
    "mean_cr2_2",
    "mean_cr4",
    "mean_cr4_causal",
    "mem8",
    "mem8_causal",
    "metric_cosine_pq",
    "metric_pruning_euclid",
    "metric_scalar",
    "multi_llm0",
    "multi_llm1",
    "partial_train",
    "pq_fusion_cr4",
    "pq_mean_cr0",
    "pq_mean_cr2",
    "pq_mean_cr2_2",
    "pq_mean_cr2_2_long",
    "pq_mean_cr4",
    "pq_mean_cr4_contOnly_rec",
    "pq_mean_cr4_instruct",
    "pq_mean_cr4_notok",
    "pq_mean_cr4_override2",
    "pq_mean_cr4_rec",
    "pq_mean_cr4_recOnly_cont",
    "pq_mean_cr4_single",
    "pq_mean_cr8",
    "pq_mean_crp4",
    "pq_mean_none",
    "pq_sum_cr4",
    "sum_cr4",
]

# Cases that encode a fault of the reference (by number in the list of its oddities). ARC-DS behaves correctly, as unit
# tests show. If the test injects the fault, all other numbers of the case must agree.
FAULTY_CASES = {
    "pq_mean_cr4_causal": "4: pooled query j sees keys 0 … j only, not all up to the end of its group",
    "pq_mean_crp4_causal": "4: pooled query j sees keys 0 … j only, not all up to the end of its group",
    "metric_pruning_norm": "10: keeps the smallest norms, sorted by norm, instead of the largest",
}


@pytest.mark.parametrize("name", CASES)
def test_every_number_of_the_case_is_reproduced(golden: Path, name: str) -> None:
    case = GoldenCase.read(golden, name)
    errors = errors_of(run_case(case), case)
    assert len(errors) > 5
    assert _beyond(errors, BOUND) == {}


@pytest.mark.parametrize("name", FAULTY_CASES)
def test_a_case_with_a_reference_fault_differs_and_agrees_once_the_fault_is_put_in(
    golden: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = GoldenCase.read(golden, name)
    right = errors_of(run_case(case), case)
    assert right["enc.pooled"] > 0.1
    compressor = build_case_compressor(case)
    if name == "metric_pruning_norm":
        layer = compressor.encoder.layers[-1]
        layer.layout = dataclasses.replace(layer.layout, strategy=_SmallestNorms())
    else:
        monkeypatch.setattr(encoder_module, "group_ends", _limits_of_the_reference)
    faulty = errors_of(run_case(case, compressor=compressor), case)
    assert _beyond(faulty, BOUND) == {}


@pytest.mark.parametrize("name", ["pq_mean_cr8", "partial_train", "multi_llm1", "mem8"])
def test_what_is_trained_is_what_the_case_trains(golden: Path, name: str) -> None:
    case = GoldenCase.read(golden, name)
    trained = {n for n, p in build_case_compressor(case).named_parameters() if p.requires_grad}
    assert trained == {internal_name(n) for n in case.meta["grad_stats"]}


@pytest.mark.parametrize("name", ["multi_llm0", "multi_llm1"])
def test_the_port_that_does_not_read_gets_a_gradient_of_exactly_zero(golden: Path, name: str) -> None:
    case = GoldenCase.read(golden, name)
    gradients = run_case(case).gradients
    idle = f"ports.{1 - case.decoder_idx}."
    of_idle = [g for n, g in gradients.items() if n.startswith(idle)]
    assert len(of_idle) == 4
    assert all(g is not None and not g.any() for g in of_idle)


def test_every_golden_case_of_this_kind_is_listed(golden: Path) -> None:
    kinds = {p.parent.name: json.loads(p.read_text(encoding="utf-8"))["kind"] for p in golden.glob("*/meta.json")}
    ours = {name for name, kind in kinds.items() if kind in ("forward_backward", "end_to_end")}
    assert ours == {*CASES, *FAULTY_CASES}


def _beyond(errors: dict[str, float], bound: float) -> dict[str, float]:
    return {name: error for name, error in errors.items() if not error <= bound}


def _limits_of_the_reference(cu_seqlens: Tensor, level: PoolLevel) -> Tensor:
    return (level.positions + 1).int()


class _SmallestNorms(Pooling):
    def _pool(self, x_TD: Tensor, spans: Spans, level: PoolLevel) -> Tensor:
        grid = ContextGrid.of(x_TD.shape[0], spans, level)
        order_CL = grid.spread(x_TD.norm(dim=-1), fill=float("inf")).argsort(dim=1)
        index_L = torch.arange(grid.shape[1])
        untouched_C = grid.num_groups_C == grid.num_rows_C
        rows_CL = torch.where(untouched_C[:, None], index_L, order_CL) + spans.cu_seqlens_k[:-1, None]
        return x_TD[rows_CL[index_L < grid.num_groups_C[:, None]]]

"""The decoder alone, without compressed vectors, against the golden files (Mistral and OLMo-1 kinds)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from arc_ds.model.decoder import Decoder
from arc_ds.model.weights import permute_rotary
from tests.parity.golden import GoldenCase, build_case_decoder, pack_case
from tests.parity.golden_run import relative_error

BOUND = 1e-5  # relative to the largest value; worst measured 9e-7
CASES = ["plain_decM", "plain_decO"]


@pytest.mark.parametrize("name", CASES)
def test_logits_and_losses_of_plain_text(golden: Path, name: str) -> None:
    case = GoldenCase.read(golden, name)
    decoder = build_case_decoder(case)
    nll, logits = _run(case, decoder)
    mask = case.loss_mask
    assert relative_error(logits, case.tensors["logits"]) < BOUND
    assert abs((nll * mask).sum() / mask.sum() - case.meta["loss_masked"]) < BOUND * case.meta["loss_masked"]
    assert abs(nll.mean() - case.meta["loss_mean"]) < BOUND * case.meta["loss_mean"]


@pytest.mark.parametrize("name", CASES)
def test_a_sequence_that_sees_its_neighbour_in_the_pack_is_noticed(golden: Path, name: str) -> None:
    case = GoldenCase.read(golden, name)
    one_sequence = {**case.meta, "seqlens": [sum(case.meta["seqlens"])]}
    joined = GoldenCase(case.root, case.name, one_sequence, case.tensors)
    _, logits = _run(joined, build_case_decoder(case))
    assert relative_error(logits, case.tensors["logits"]) > 0.01


@pytest.mark.parametrize("name", CASES)
def test_rotary_pairs_of_the_wrong_layout_are_noticed(golden: Path, name: str) -> None:
    case = GoldenCase.read(golden, name)
    decoder = build_case_decoder(case)
    for layer in decoder.layers:
        wq = layer.attention.wq.weight
        wq.data = permute_rotary(wq.data, decoder.config.num_heads, to="interleaved")
    _, logits = _run(case, decoder)
    assert relative_error(logits, case.tensors["logits"]) > 0.01


def _run(case: GoldenCase, decoder: Decoder) -> tuple[Tensor, Tensor]:
    """NLL and logits of every text token."""
    batch = pack_case(case)
    nothing = torch.zeros(0, decoder.config.hidden_size)
    return decoder(batch, nothing), decoder.logits(batch, nothing, batch.text_rows)

"""The count of operations against torch's own count, and against figures for the paper's setting."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from arc_ds.batch.groups import GroupRule
from arc_ds.batch.packing import PackedBatch, PoolingSpec, pack
from arc_ds.batch.segments import Sample, Segment
from arc_ds.config.schema import EncoderConfig, LoraConfig
from arc_ds.data.loading.estimates import Estimate
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.compressor import connect_adapters
from arc_ds.model.decoder import Decoder
from arc_ds.model.decoder_adapters import DecoderLora
from arc_ds.model.spec import CompressorSpec
from arc_ds.planning.flops import Operations, StepFlops, count_flops, work_rates
from arc_ds.training.build_model import lora_spec
from arc_ds.training.engine import set_trained
from tests.helpers.tiny_compressor import TINY, sample, tiny_compressor, tiny_decoder

TERA = 10**12
LLAMA_3_2_3B = BackboneConfig(
    family="llama", hidden_size=3072, num_layers=28, num_heads=24, num_kv_heads=8, head_dim=128, ffn_size=8192,
    vocab_size=128256, rope_theta=5e5, norm_eps=1e-5, tie_embeddings=True,
)  # fmt: skip
LLAMA_3_1_8B = BackboneConfig(
    family="llama", hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, ffn_size=14336,
    vocab_size=128256, rope_theta=5e5, norm_eps=1e-5,
)  # fmt: skip
SPEC = CompressorSpec(
    backbone=TINY, num_layers=3, rules=(GroupRule("factor", 4),), bridge_hidden_size=20, decoder_sizes=(12,)
)
PAPER = CompressorSpec(backbone=LLAMA_3_2_3B, num_layers=26, markers=(), decoder_sizes=(4096,))


def test_the_papers_step_is_counted_as_in_the_design() -> None:
    """Encoder 21 TFLOP forward and 42 backward, decoder 121 and 67, head 9 at 4096 labelled rows; rounded to TFLOP.

    The figures assume 16 continuations of full length. Each has 256 prefix tokens, 256 context tokens compressed to 32
    vectors without a marker, and 256 continuation tokens. This gives 4096 encoder tokens in total and 544 decoder rows
    per sample (8704 in total); 288 rows per sample (4608) are suffix. The decoder's 121 covers only its linear part;
    its attention (1.2) is stated separately.
    """
    ids = range(256)
    continuation = Sample("continuation", (Segment.text(ids), Segment.context(ids, None), Segment.text(ids, True)))
    batch = pack([continuation] * 16, PAPER.packing)
    assert (batch.num_encoder_tokens, batch.num_decoder_rows, batch.num_labels) == (4096, 8704, 4080)
    flops = count_flops(batch, PAPER, LLAMA_3_1_8B)
    found = [
        flops.encoder_forward.total,
        flops.encoder_backward.total,
        flops.decoder_forward.linear,
        flops.decoder_backward.total,
        flops.head,
    ]
    assert [each / TERA for each in found] == pytest.approx([21, 42, 121, 67, 9], abs=0.5)
    assert flops.decoder_forward.attention / TERA == pytest.approx(1.2, abs=0.05)
    assert flops.total / TERA == pytest.approx(260, rel=0.01)


@pytest.mark.parametrize(
    ("estimate", "bound"),
    [
        # The pooling layer has less work (at most 1/26 of the encoder's linear operations); the rates ignore that.
        pytest.param(Estimate(context_lengths=(256,), prefix_rows=256, suffix_rows=288), 0.03, id="continuation"),
        pytest.param(Estimate(context_lengths=(1024,) * 32, prefix_rows=0, suffix_rows=4352), 0.04, id="long context"),
        # A fifth of the decoder's rows have no gradient, but their attention is counted as if they did.
        pytest.param(Estimate(context_lengths=(2048,), prefix_rows=256, suffix_rows=1024), 0.04, id="one document"),
    ],
)
def test_work_is_dealt_by_these_operations(estimate: Estimate, bound: float) -> None:
    contexts = [Segment.context(range(length), None) for length in estimate.context_lengths]
    compressed = sum(length // 8 for length in estimate.context_lengths)
    prefix, suffix = range(estimate.prefix_rows), range(estimate.suffix_rows - compressed)
    laid_out = Sample("continuation", (Segment.text(prefix), *contexts, Segment.text(suffix, True)))
    flops = count_flops(pack([laid_out], PAPER.packing), PAPER, LLAMA_3_1_8B)
    counted = sum(part.total for part in _passes(flops))
    assert work_rates(PAPER, LLAMA_3_1_8B).work(estimate) == pytest.approx(counted, rel=bound)
    linear = replace(work_rates(PAPER, LLAMA_3_1_8B), encoder_pair=0.0, decoder_pair=0.0).work(estimate)
    attention = sum(part.attention for part in _passes(flops)) / counted
    assert linear / counted == pytest.approx(1 - attention, abs=bound)
    adapted = replace(PAPER, adapters=(DecoderLora.of(LLAMA_3_1_8B, rank=128, scale=1.0),))
    flops = count_flops(pack([laid_out], PAPER.packing), adapted, LLAMA_3_1_8B)
    counted = sum(part.total for part in _passes(flops))
    assert work_rates(adapted, LLAMA_3_1_8B).work(estimate) == pytest.approx(counted, rel=bound)


def _batch(spec: PoolingSpec) -> PackedBatch:
    """Ragged sequences: two with a prefix, one without a context, one with two contexts."""
    return pack([sample(3, -9, 5), sample(-7, 2, -4, 6, seed=1), sample(4, seed=2), sample(1, -5, 1, seed=3)], spec)


def _measured(batch: PackedBatch, compressor: Any, decoder: Decoder) -> dict[str, int]:
    """torch's count for a whole pass, by operation. Attention is unfused so that torch counts it."""
    in_place = {torch.ops.aten.addmm_: _added_product}  # torch does not count the sum of input gradients
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, sdpa_kernel(SDPBackend.MATH):
        decoder(batch, compressor(batch)).sum().backward()
    return {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}


def _added_product(_: Any, a: Any, b: Any, **__: Any) -> int:
    """Operations of a matrix product with factors of shapes [m, k] and [k, n]."""
    return 2 * a[0] * a[1] * b[1]


def _passes(flops: StepFlops) -> tuple[Operations, ...]:
    return flops.encoder_forward, flops.encoder_backward, flops.decoder_forward, flops.decoder_backward


@pytest.mark.parametrize(
    ("changes", "trained_layers", "train_embeddings"),
    [
        pytest.param({}, None, True, id="all trained"),
        pytest.param({}, 1, True, id="a gradient passes through frozen layers"),
        pytest.param({}, 1, False, id="no gradient below the trained layers"),
        pytest.param({}, 0, False, id="bridge and markers only"),
        pytest.param({"pooled_queries": False}, None, True, id="keys are pooled too"),
        pytest.param({"where": "between"}, None, True, id="pooled after attention"),
        pytest.param({"where": "after"}, None, True, id="pooled after the layer"),
        pytest.param({"rules": (GroupRule("factor", 2),) * 2, "causal": True}, None, True, id="two poolings, causal"),
        pytest.param({"rules": (), "memory_tokens": 2}, 1, False, id="memory tokens below frozen layers"),
        pytest.param({"bridge": "linear"}, None, True, id="a bridge of one linear"),
        pytest.param({"bridge_hidden_size": None}, None, True, id="a bridge of the decoder's width"),
    ],
)
def test_products_with_weights_are_those_that_torch_counts(
    changes: dict[str, Any], trained_layers: int | None, train_embeddings: bool
) -> None:
    _compare_with_torch(changes, trained_layers=trained_layers, train_embeddings=train_embeddings)


@pytest.mark.parametrize(
    ("train", "lora", "decoder_lora"),
    [
        ("bridge", None, None),
        ("all", LoraConfig(rank=2, alpha=4.0), None),
        ("all", LoraConfig(rank=2, alpha=4.0), DecoderLora.of(tiny_decoder().config, rank=3, scale=1.0)),
    ],
    ids=["memory tokens are frozen too", "adapters", "adapters of encoder and decoder"],
)
def test_products_are_counted_for_the_parts_that_the_config_trains(
    train: Literal["all", "bridge"], lora: LoraConfig | None, decoder_lora: DecoderLora | None
) -> None:
    changes: dict[str, Any] = {"rules": (), "memory_tokens": 2}
    adapters = {} if decoder_lora is None else {"adapters": (decoder_lora,)}
    with_memory = _compare_with_torch(changes | adapters, train=train, lora=lora)
    old_keys = _compare_with_torch(changes, trained_layers=0, train_embeddings=False)
    assert with_memory != old_keys


def _compare_with_torch(changes: dict[str, Any], **encoder: Any) -> int:
    spec = replace(SPEC, **changes)
    parts = EncoderConfig(backbone="", **encoder).trained_parts
    compressor, decoder = tiny_compressor(lora=lora_spec(encoder.get("lora")), **changes), tiny_decoder()
    set_trained(compressor.encoder, **parts)
    connect_adapters(compressor.ports, [decoder])
    batch = _batch(spec.packing)
    flops = count_flops(batch, spec, decoder.config, parts)
    measured = _measured(batch, compressor, decoder)
    assert measured["aten.addmm_"] > 0
    linear = sum(part.linear for part in _passes(flops)) + flops.bridge + flops.head
    assert linear == measured["aten.mm"] + measured["aten.addmm_"]
    return linear


def test_attention_is_what_torch_counts_where_nothing_is_masked() -> None:
    """Encoder contexts of equal length. torch keeps the scores for backward, so it counts four products, not five."""
    compressor = tiny_compressor()
    batch = pack([sample(-8), sample(-8, seed=1)], SPEC.packing)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        states = compressor.encoder(batch)
    forward = counter.get_flop_counts()["Global"]
    with FlopCounterMode(display=False) as counter:
        states.sum().backward()
    backward = counter.get_flop_counts()["Global"]
    flops = count_flops(batch, SPEC, tiny_decoder().config)
    assert flops.encoder_forward.attention == forward[torch.ops.aten.bmm]
    assert flops.encoder_backward.attention == backward[torch.ops.aten.bmm] * 5 // 4


def test_masked_pairs_are_not_counted() -> None:
    """Each decoder row attends to itself and to all preceding rows. In backward only suffix rows are queries."""
    batch = _batch(SPEC.packing)
    flops = count_flops(batch, SPEC, tiny_decoder().config)
    assert batch.prefix is not None
    suffix = set(batch.prefix.suffix_rows.tolist())
    bounds = batch.decoder_cu_seqlens.tolist()
    pairs = [
        (row, key)
        for start, end in itertools.pairwise(bounds)
        for row in range(start, end)
        for key in range(start, row + 1)
    ]
    a_pair = 4 * TINY.num_heads * TINY.head_dim * TINY.num_layers
    assert flops.decoder_forward.attention == len(pairs) * a_pair
    assert flops.decoder_backward.attention == sum(row in suffix for row, _ in pairs) * a_pair * 5 // 2
    causal = count_flops(batch, replace(SPEC, causal=True), tiny_decoder().config)
    assert causal.encoder_forward.attention < flops.encoder_forward.attention


def test_pairs_outside_the_window_of_a_layer_are_not_counted() -> None:
    batch = _batch(SPEC.packing)
    sizes = replace(tiny_decoder().config, window=3, windowed_layers=(0, 2))
    bounds = batch.decoder_cu_seqlens.tolist()
    seen = [row - start + 1 for start, end in itertools.pairwise(bounds) for row in range(start, end)]
    a_pair = 4 * TINY.num_heads * TINY.head_dim
    flops, whole = count_flops(batch, SPEC, sizes), count_flops(batch, SPEC, tiny_decoder().config)
    assert flops.decoder_forward.attention == a_pair * sum(n + 2 * min(n, 3) for n in seen)
    suffix = batch.prefix.suffix_rows.tolist()
    assert flops.decoder_backward.attention == a_pair * sum(seen[n] + 2 * min(seen[n], 3) for n in suffix) * 5 // 2
    assert flops.decoder_forward.linear == whole.decoder_forward.linear
    # The encoder's windows count only if it is causal. The pooled layer has the window, too.
    windowed = replace(SPEC, backbone=replace(TINY, window=3, windowed_layers=(1, 2)))
    assert count_flops(batch, windowed, sizes).encoder_forward == whole.encoder_forward
    contexts = [9, 7, 4, 5]
    ends = [3, 6, 9, 4, 7, 4, 3, 5]
    of_tokens = [n + min(n, 3) for length in contexts for n in range(1, length + 1)]
    causal = count_flops(batch, replace(windowed, causal=True), sizes).encoder_forward
    assert causal.attention == a_pair * (sum(of_tokens) + sum(min(end, 3) for end in ends))

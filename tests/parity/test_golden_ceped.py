"""CEPED: every golden number of the published model's code on a tiny random model, and deliberate mistakes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import arc_kernels as ak
from arc_ds.batch.packing import PackedBatch, PoolingSpec, pack
from arc_ds.batch.segments import Sample, Segment
from arc_ds.model.backbone import RMSNorm, Stream
from arc_ds.model.ceped import (
    Ceped,
    CepedBlock,
    CepedDecoder,
    CrossAttention,
    CrossKeys,
    EncodedContext,
    load_ceped,
)
from arc_ds.model.rope import Rope, ropes_at
from tests.helpers.generation import generate_ids

CASES = ("case_a_no_context", "case_b_one_chunk", "case_c_chunks_left", "case_c_chunks_right")
# Largest difference relative to the largest value of a tensor. The golden numbers are float32 and up to 2e-5 away from
# float64 at values of up to 14, so they are exact to 1.4e-6 themselves. Ours differ from them by 1.3e-6 at most.
BOUND = 1e-5


@pytest.fixture(scope="module")
def golden_ceped() -> Path:
    """The folder of CEPED's golden files: $ARC_GOLDEN_CEPED, or `golden_ceped` next to the other golden files."""
    shared = Path(os.environ.get("ARC_GOLDEN", Path(__file__).parents[3] / "shared" / "golden")).parent
    folder = Path(os.environ.get("ARC_GOLDEN_CEPED", shared / "golden_ceped"))
    if not folder.is_dir():
        pytest.skip(f"no golden files of CEPED at {folder}; set ARC_GOLDEN_CEPED to their folder")
    return folder


@pytest.fixture
def model(golden_ceped: Path) -> Ceped:
    return load_ceped(golden_ceped / "model", torch.device("cpu"), torch.float32)


@dataclasses.dataclass(frozen=True)
class Case:
    """A golden case without its padding.

    prompts: the decoder's ids of each sequence.
    contexts: the chunks of each sequence; none in a case without context.
    tensors: the golden tensors.
    """

    prompts: list[list[int]]
    contexts: list[list[list[int]]]
    tensors: dict[str, Tensor]

    @staticmethod
    def read(folder: Path, name: str) -> Case:
        tensors = load_file(folder / f"{name}.safetensors")
        prompts = list(_unpadded(tensors["input_ids"], tensors["attention_mask"]))
        if "encoder_input_ids" not in tensors:
            return Case(prompts, [], tensors)
        pairs = zip(tensors["encoder_input_ids"], tensors["encoder_attention_mask"], strict=True)
        return Case(prompts, [list(_unpadded(*pair)) for pair in pairs], tensors)

    def rows(self, name: str) -> Tensor:
        """The rows of a golden tensor whose mask is 1, in reading order."""
        is_of_encoder = name.startswith("encoder_")
        mask = self.tensors["encoder_attention_mask" if is_of_encoder else "attention_mask"]
        return self.tensors[name][mask.bool()]

    @property
    def names(self) -> list[str]:
        """The golden tensors of floats."""
        return [name for name, tensor in self.tensors.items() if tensor.is_floating_point()]

    @property
    def batch(self) -> PackedBatch:
        return pack([Sample("golden", (Segment.text(ids),)) for ids in self.prompts], PoolingSpec(rules=()))


def _unpadded(ids: Tensor, mask: Tensor) -> Iterator[list[int]]:
    return (row[row_mask.bool()].tolist() for row, row_mask in zip(ids, mask, strict=True))


def outputs(model: Ceped, case: Case) -> dict[str, Tensor]:
    """All numbers that the golden files may hold, by golden name."""
    found: dict[str, Tensor] = {}
    watched = [(f"encoder_layer_{idx}", layer) for idx, layer in enumerate(model.encoder.layers)]
    watched += [(f"decoder_layer_{idx}", layer) for idx, layer in enumerate(model.decoder.layers)]
    watched += [
        (f"cross_attn_{idx}", layer.cross_attention)
        for idx, layer in enumerate(model.decoder.layers)
        if isinstance(layer, CepedBlock)
    ]

    def record(name: str) -> Callable[[nn.Module, object, Stream | Tensor], None]:
        def hook(_module: nn.Module, _inputs: object, output: Stream | Tensor) -> None:
            found[name] = output.total_TD if isinstance(output, Stream) else output

        return hook

    hooks = [module.register_forward_hook(record(name)) for name, module in watched]
    reader: CepedDecoder = model.decoder
    if case.contexts:
        context = model.encode(case.contexts)
        found["encoder_hidden_states"], reader = context.states, model.decoder.reading(context)
    with torch.no_grad():
        batch = case.batch
        found["logits"] = reader.logits(batch, None, torch.arange(batch.num_decoder_rows))
    for hook in hooks:
        hook.remove()
    return found


def errors(model: Ceped, case: Case) -> dict[str, float]:
    """The largest difference of each golden tensor, relative to its largest value."""
    ours = outputs(model, case)
    return {name: _relative(ours[name], case.rows(name)) for name in case.names}


def _relative(ours: Tensor, expected: Tensor) -> float:
    assert ours.shape == expected.shape and expected.abs().max() > 0
    return float((ours - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_every_golden_number_of_a_case(model: Ceped, golden_ceped: Path, name: str) -> None:
    case = Case.read(golden_ceped, name)
    found = errors(model, case)
    assert len(found) >= 4 and max(found.values()) < BOUND, found
    if case.contexts:
        plain = errors(model, dataclasses.replace(case, contexts=[], tensors=_without_encoder(case)))
        assert plain["logits"] > 0.1, "the context changes nothing"


def _without_encoder(case: Case) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in case.tensors.items() if name in ("attention_mask", "logits")}


@pytest.mark.parametrize("with_context", [True, False])
def test_greedy_tokens_and_the_logits_of_each_step(model: Ceped, golden_ceped: Path, with_context: bool) -> None:
    case = Case.read(golden_ceped, "case_d_greedy")
    reader = model.decoder.reading(model.encode(case.contexts)) if with_context else model.decoder
    logits: list[Tensor] = []
    ids = generate_ids(reader, case.batch, None, max_new_tokens=12, on_logits=lambda step: logits.append(step))
    assert ids == case.tensors["generated_ids" if with_context else "generated_ids_without_context"].tolist()
    if with_context:
        assert _relative(torch.stack(logits, dim=1), case.tensors["step_logits"]) < BOUND


def test_keys_and_values_of_the_context_are_computed_once(
    model: Ceped, golden_ceped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, calls, real = Case.read(golden_ceped, "case_d_greedy"), [], CrossAttention.keys_values
    monkeypatch.setattr(CrossAttention, "keys_values", lambda *args: calls.append(1) or real(*args))
    reader = model.decoder.reading(model.encode(case.contexts))
    generate_ids(reader, case.batch, None, max_new_tokens=12)
    assert len(calls) == 2  # layers 1 and 2


def _causal_encoder(model: Ceped) -> None:
    model.encoder.causal = True


def _no_final_norm(model: Ceped) -> None:
    model.encoder.norm = nn.Identity()  # type: ignore[assignment]


def _swapped_eps(model: Ceped) -> None:
    of_encoder, of_decoder = model.config.encoder.norm_eps, model.config.decoder.norm_eps
    for part, eps in ((model.encoder, of_decoder), (model.decoder, of_encoder)):
        for norm in part.modules():
            if isinstance(norm, RMSNorm):
                norm.eps = eps


def _shared_norm(model: Ceped) -> None:
    for layer in model.decoder.layers:
        if isinstance(layer, CepedBlock):
            layer.cross_attention.norm = layer.ffn_norm  # type: ignore[assignment]


def _one_theta(model: Ceped) -> None:
    model.encoder.config = dataclasses.replace(model.encoder.config, rope_theta=model.config.decoder.rope_theta)


def _rotary_cross_attention(model: Ceped) -> None:
    def rope_of(cu_seqlens: Tensor) -> Rope:
        positions = torch.cat([torch.arange(int(length)) for length in cu_seqlens.diff()])
        return ropes_at(positions, model.config.decoder, None)[0]

    class Rotating(CrossAttention):
        def forward(self, x_TD: Tensor, cross: CrossKeys) -> Tensor:
            keys = ak.rotary(cross.keys, *rope_of(cross.spans.cu_seqlens_k).keys)
            q_TNH = self.wq(self.norm(x_TD)).unflatten(-1, (-1, self.head_dim))
            q_TNH = ak.rotary(q_TNH, *rope_of(cross.spans.cu_seqlens_q).queries)
            cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *_ = cross.spans
            o_TNH = ak.attention_varlen(
                q_TNH,
                keys,
                cross.values,
                cu_seqlens_q=cu_seqlens_q,
                cu_seqlens_k=cu_seqlens_k,
                max_seqlen_q=max_seqlen_q,
                max_seqlen_k=max_seqlen_k,
            )
            return self.wo(o_TNH.flatten(1))

    for layer in model.decoder.layers:
        if isinstance(layer, CepedBlock):
            layer.cross_attention.__class__ = Rotating


def _chunks_as_one(model: Ceped) -> None:
    encode = model.encode

    def joined(contexts: list[list[list[int]]]) -> EncodedContext:
        return encode([[[token for chunk in context for token in chunk]] for context in contexts])

    model.encode = joined  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize(
    "spoil",
    [
        _causal_encoder,
        _no_final_norm,
        _swapped_eps,
        _shared_norm,
        _one_theta,
        _rotary_cross_attention,
        _chunks_as_one,
    ],
)
def test_a_wrong_variant_misses_the_golden_logits(
    model: Ceped, golden_ceped: Path, spoil: Callable[[Ceped], None]
) -> None:
    case = Case.read(golden_ceped, "case_c_chunks_left")
    spoil(model)
    logits = outputs(model, case)["logits"]
    assert _relative(logits, case.rows("logits")) > 100 * BOUND

"""The paper's pretraining step with random weights: the sizes, a batch, and the models of one micro-batch.

`roofline.py` counts this step on meta tensors; `gpu_day.py` times it on a GPU. Nothing is read from disk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from arc_ds.batch.packing import PackedBatch, pack
from arc_ds.batch.segments import Sample, Segment
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.compressor import Compressor
from arc_ds.model.decoder import Decoder
from arc_ds.model.pooling import group_rules
from arc_ds.model.spec import CompressorSpec, build_compressor
from arc_ds.model.weights.release import LLAMA_32_3B

LLAMA_31_8B = replace(LLAMA_32_3B, hidden_size=4096, num_layers=32, num_heads=32, ffn_size=14336)
INIT_STD = 0.02  # Llama's initializer_range


@dataclass(frozen=True, kw_only=True)
class StepSize:
    """Sizes of one micro-batch of continuation: prefix, compressed context, continuation (paper, section 4)."""

    encoder: BackboneConfig = LLAMA_32_3B
    decoder: BackboneConfig = LLAMA_31_8B
    num_truncated_layers: int = 2
    bridge_hidden_size: int = 2048
    pooling_factor: int = 8
    batch_size: int = 16
    prefix_tokens: int = 256
    context_tokens: int = 256
    continuation_tokens: int = 256

    @property
    def spec(self) -> CompressorSpec:
        """The compressor of this size."""
        return CompressorSpec(
            backbone=self.encoder,
            num_layers=self.encoder.num_layers - self.num_truncated_layers,
            rules=group_rules("mean", [self.pooling_factor]),
            bridge_hidden_size=self.bridge_hidden_size,
            decoder_sizes=(self.decoder.hidden_size,),
        )

    def __str__(self) -> str:
        encoder, decoder = self.encoder, self.decoder
        return (
            f"encoder {encoder.hidden_size} wide, {self.spec.num_layers} layers; decoder {decoder.hidden_size} wide, "
            f"{decoder.num_layers} layers; batch {self.batch_size}, {self.prefix_tokens} + {self.context_tokens} + "
            f"{self.continuation_tokens} tokens, factor {self.pooling_factor}"
        )


PAPER = StepSize()
TOY = StepSize(
    encoder=replace(
        LLAMA_32_3B, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=64, vocab_size=97
    ),
    decoder=replace(
        LLAMA_32_3B, hidden_size=48, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=8, ffn_size=80, vocab_size=89
    ),
    num_truncated_layers=2,
    bridge_hidden_size=24,
    batch_size=2,
    prefix_tokens=8,
    context_tokens=12,
    continuation_tokens=8,
    pooling_factor=4,
)


def make_batch(size: StepSize) -> PackedBatch:
    """A batch of continuation with random tokens, on the host. Equal sizes make equal batches."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int, vocab_size: int) -> list[int]:
        return torch.randint(vocab_size, (count,), generator=generator).tolist()

    samples = [
        Sample(
            "continuation",
            (
                Segment.text(tokens(size.prefix_tokens, size.decoder.vocab_size)),
                Segment.context(tokens(size.context_tokens, size.encoder.vocab_size)),
                Segment.text(tokens(size.continuation_tokens, size.decoder.vocab_size), in_loss=True),
            ),
        )
        for _ in range(size.batch_size)
    ]
    return pack(samples, size.spec.packing)


def build_models(
    size: StepSize, *, device: torch.device | str, dtype: torch.dtype, recompute: bool = False
) -> tuple[Compressor, Decoder]:
    """Compressor and frozen decoder with random weights, made on the device.

    size: their sizes.
    device: "meta" leaves the weights without values.
    dtype: of all weights.
    recompute: whether each layer keeps its input alone and runs again in backward.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            compressor = build_compressor(size.spec, activation_checkpointing="full" if recompute else "none")
            decoder = Decoder(size.decoder, activation_checkpointing="full" if recompute else "none")
    finally:
        torch.set_default_dtype(before)
    for model in (compressor, decoder):
        fill_randomly(model)
    return compressor, decoder


@torch.no_grad()
def fill_randomly(model: nn.Module) -> None:
    """Normal matrices of standard deviation 0.02; vectors, which are norms' weights and markers, become ones."""
    for parameter in model.parameters():
        is_matrix = parameter.dim() == 2 and parameter.shape[0] > 1
        if is_matrix:
            parameter.normal_(std=INIT_STD)
        else:
            parameter.fill_(1.0)

"""The frozen decoder: a causal language model that reads compressed vectors among its token embeddings.

Shape letters: N text tokens, Z compressed vectors, R rows, L labels, D width, V vocabulary, S sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from arc_ds.data.packing import PackedBatch
from arc_ds.model.backbone import Block, Head, LayerCache, Spans, TokenEmbedding, make_norm
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.rope import rope_at


class DecoderRows(NamedTuple):
    """What stands in which row of the decoder's packed input."""

    ids: Tensor  # int64 [N]
    text_rows: Tensor  # int64 [N]
    compressed_rows: Tensor  # int64 [Z]
    cu_seqlens: Tensor  # int32 [S + 1]
    positions: Tensor  # int64 [R]
    max_seqlen: int

    @staticmethod
    def of(batch: PackedBatch) -> DecoderRows:
        """The decoder's side of a batch."""
        return DecoderRows(
            batch.decoder_ids,
            batch.text_rows,
            batch.compressed_rows,
            batch.decoder_cu_seqlens,
            batch.decoder_positions,
            batch.decoder_max_seqlen,
        )


class Decoder(nn.Module):
    """A causal LM whose parameters never change; gradients pass through it to the compressed vectors."""

    def __init__(self, config: BackboneConfig, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.tok_embeddings = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = make_norm(config)
        self.output = Head(config.vocab_size, config.hidden_size)
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.requires_grad_(False)

    def forward(self, batch: PackedBatch, z_ZD: Tensor | None) -> Tensor:
        """NLL in nats of each label of the batch given the compressed vectors [Z, D] (None: text only): float32 [L]."""
        h_RD = self.hidden(DecoderRows.of(batch), z_ZD)
        return self.output(self.norm(h_RD[batch.label_rows]), batch.labels)

    def logits(self, batch: PackedBatch, z_ZD: Tensor | None, rows: Tensor) -> Tensor:
        """Logits of the given rows (int64 [n]): float32 [n, V]."""
        return self.output(self.norm(self.hidden(DecoderRows.of(batch), z_ZD)[rows]))

    def hidden(self, rows: DecoderRows, z_ZD: Tensor | None, caches: list[LayerCache] | None = None) -> Tensor:
        """Last hidden states before the final norm, [R, D]. `caches`: one a layer, during generation."""
        x_RD = self.tok_embeddings(
            rows.ids, rows.text_rows, z_ZD, None if z_ZD is None else rows.compressed_rows
        )
        rope = rope_at(rows.positions, self.config)
        spans = Spans.within(rows.cu_seqlens, rows.max_seqlen, causal=True)
        recompute = self.activation_checkpointing and torch.is_grad_enabled() and x_RD.requires_grad
        for layer_idx, layer in enumerate(self.layers):
            if recompute:
                x_RD = checkpoint(layer, x_RD, rope, spans, use_reentrant=False)
            else:
                x_RD = layer(x_RD, rope, spans, None if caches is None else caches[layer_idx])
        return x_RD

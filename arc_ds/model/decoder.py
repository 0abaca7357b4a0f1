"""The frozen decoder: a causal language model that reads compressed vectors between its token embeddings.

Shape letters: N text tokens, Z compressed vectors, R rows, L labels, D width, V vocabulary, S sequences.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from arc_ds.batch.packing import PackedBatch, PrefixSplit
from arc_ds.model.backbone import (
    DecoderBlock,
    Head,
    LayerCache,
    PrefixPass,
    PrefixSpans,
    Spans,
    Stream,
    TokenEmbedding,
    make_norm,
)
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.rope import Rope, rope_at


class DecoderRows(NamedTuple):
    """The layout of the decoder's packed input."""

    ids: Tensor  # int64 [N]
    text_rows: Tensor  # int64 [N]
    compressed_rows: Tensor  # int64 [Z]
    cu_seqlens: Tensor  # int32 [S + 1]
    positions: Tensor  # int64 [R]
    max_seqlen: int
    prefix: PrefixSplit | None = None

    @staticmethod
    def of(batch: PackedBatch) -> DecoderRows:
        """The decoder's part of a batch."""
        return DecoderRows(
            batch.decoder_ids,
            batch.text_rows,
            batch.compressed_rows,
            batch.decoder_cu_seqlens,
            batch.decoder_positions,
            batch.decoder_max_seqlen,
            batch.prefix,
        )


class Decoder(nn.Module):
    """A causal LM with frozen parameters. Gradients flow through it to the compressed vectors."""

    def __init__(self, config: BackboneConfig, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.tok_embeddings = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_layers))
        self.norm = make_norm(config)
        self.output = Head(config.vocab_size, config.hidden_size)
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.requires_grad_(False)

    def forward(self, batch: PackedBatch, z_ZD: Tensor | None) -> Tensor:
        """NLL in nats of each label of the batch, float32 [L]; `z_ZD` are the compressed vectors (None: text only)."""
        h_RD = self.hidden(DecoderRows.of(batch), z_ZD)
        return self.output(self.norm(h_RD[batch.label_rows]), batch.labels)

    def logits(self, batch: PackedBatch, z_ZD: Tensor | None, rows: Tensor) -> Tensor:
        """Logits of the given rows (int64 [n]): float32 [n, V]."""
        return self.output(self.norm(self.hidden(DecoderRows.of(batch), z_ZD)[rows]))

    def hidden(self, rows: DecoderRows, z_ZD: Tensor | None, caches: list[LayerCache] | None = None) -> Tensor:
        """Last hidden states before the final norm, [R, D].

        z_ZD: compressed vectors; None for text only.
        caches: one cache per layer, during generation only.

        In training, rows before a sequence's first compressed row run without gradient (`packing.PrefixSplit`).
        """
        x_RD = self.tok_embeddings(rows.ids, rows.text_rows, z_ZD, None if z_ZD is None else rows.compressed_rows)
        rope = rope_at(rows.positions, self.config)
        spans = Spans.within(rows.cu_seqlens, rows.max_seqlen, causal=True)
        if rows.prefix is not None and caches is None and torch.is_grad_enabled() and x_RD.requires_grad:
            return self._hidden_by_parts(x_RD, rope, rows, rows.prefix)
        stream = Stream(x_RD)
        for layer_idx, layer in enumerate(self.layers):
            stream = self._run(layer, stream, rope, spans, None if caches is None else caches[layer_idx])
        return stream.total_TD

    def _hidden_by_parts(self, x_RD: Tensor, rope: Rope, rows: DecoderRows, prefix: PrefixSplit) -> Tensor:
        """Run each layer on the prefixes without gradient, then on the suffixes, which attend to both."""
        prefix_cu, suffix_cu = prefix.prefix_cu_seqlens, prefix.suffix_cu_seqlens
        split = PrefixSpans(
            prefix_rows=prefix.prefix_rows,
            suffix_rows=prefix.suffix_rows,
            prefix_rope=rope.at(prefix.prefix_rows),
            suffix_rope=rope.at(prefix.suffix_rows),
            prefix_spans=Spans.within(prefix_cu, prefix.prefix_max_seqlen, causal=True),
            suffix_spans=Spans(suffix_cu, rows.cu_seqlens, prefix.suffix_max_seqlen, rows.max_seqlen, causal=True),
        )
        before, after = Stream(x_RD[prefix.prefix_rows].detach()), Stream(x_RD[prefix.suffix_rows])
        for layer in self.layers:
            passing = PrefixPass(before)
            after = self._run(layer, after, prefix=passing, split=split)
            before = passing.take()  # a layer that backward recomputes keeps `passing` alive
        return split.join(before.total_TD, after.total_TD)

    def _run(self, layer: nn.Module, stream: Stream, *args: Any, **kwargs: Any) -> Stream:
        if self.activation_checkpointing and torch.is_grad_enabled() and stream.x_TD.requires_grad:
            # Checkpointing saves the layer's input. The sum is one tensor instead of two.
            return checkpoint(layer, stream.total_TD, None, *args, use_reentrant=False, **kwargs)
        return layer(*stream, *args, **kwargs)

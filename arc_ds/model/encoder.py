"""The encoder: a truncated backbone whose last layers pool (paper, section 3).

Shape letters: T tokens, U rows (tokens and memory slots), G groups, C contexts, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arc_ds.batch.packing import PackedBatch, PoolLevel
from arc_ds.model.backbone import Block, Recompute, Spans, Stream, TokenEmbedding, run_layer
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.pooling import Pooling
from arc_ds.model.rope import Rope, lengths_of_rows, ropes_at

Where = Literal["before", "between", "after"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolingLayout:
    """How the last layers pool.

    strategy: the pooling strategy.
    num_pooled_layers: number of last layers that pool. The batch has one `PoolLevel` for each of them.
    pooled_queries: if True, queries and residual come from the pooled rows, keys and values from the unpooled rows. If
        False, all come from the pooled rows. Only for `where` "before".
    where: pool "before" the attention, "between" attention and feed-forward, or "after" the layer. After it, each row
        is first scaled to root mean square 1, as by a final norm without weights.
    """

    strategy: Pooling
    num_pooled_layers: int = 1
    pooled_queries: bool = True
    where: Where = "before"


class PooledBlock(Block):
    """A layer that reads the rows of one pooling level and returns the rows of the next."""

    def __init__(
        self,
        config: BackboneConfig,
        layout: PoolingLayout,
        window: int | None,
        *,
        causal: bool,
        selective: bool = False,
    ) -> None:
        super().__init__(config, window, selective=selective)
        self.layout, self.eps = layout, config.norm_eps
        self.causal = causal

    def forward(  # type: ignore[override]
        self, x_TD: Tensor, update_TD: Tensor | None, rope_T: Rope, rope_G: Rope, spans: Spans, level: PoolLevel
    ) -> Stream:
        """Map a stream of T rows to a stream of G pooled rows. `spans` belong to the input rows."""
        layout = self.layout
        if layout.where == "after":
            h_TD = super().forward(x_TD, update_TD, rope_T, spans).total_TD
            return Stream(layout.strategy.pool(F.rms_norm(h_TD, h_TD.shape[-1:], eps=self.eps), spans, level))
        if layout.where == "between":
            input_TD, x_TD = self._enter(x_TD, update_TD)
            attended_TD = self.attention(input_TD, input_TD, rope_T, rope_T, spans)
            h_TD = x_TD + self._update(attended_TD, self.attention_norm)
            return self._feed(layout.strategy.pool(h_TD, spans, level))
        x_TD = Stream(x_TD, update_TD).total_TD
        if not layout.pooled_queries:
            pooled_GD = layout.strategy.pool(x_TD, spans, level)
            within = Spans.within(level.cu_seqlens, level.max_seqlen, causal=self.causal)
            return super().forward(pooled_GD, None, rope_G, within)
        queries_GD, keys_TD, pooled_GD = self._pool(x_TD, spans, level)
        across = Spans(
            cu_seqlens_q=level.cu_seqlens,
            cu_seqlens_k=spans.cu_seqlens_k,
            max_seqlen_q=level.max_seqlen,
            max_seqlen_k=spans.max_seqlen_k,
            k_limits=group_ends(spans.cu_seqlens_k, level) if self.causal else None,
        )
        attended_GD = self.attention(queries_GD, keys_TD, rope_G, rope_T, across)
        return self._finish(attended_GD, pooled_GD)

    def _pool(self, x_TD: Tensor, spans: Spans, level: PoolLevel) -> tuple[Tensor, Tensor, Tensor]:
        """Input of the queries [G, D], input of the keys and values [T, D], and the pooled rows [G, D]."""
        if self.norms_output:
            pooled_GD = self.layout.strategy.pool(x_TD, spans, level)
            return pooled_GD, x_TD, pooled_GD
        pooled = self.layout.strategy.pool_norm(x_TD, spans, level, self.attention_norm)
        return pooled.normed_pooled_GD, pooled.normed_TD, pooled.pooled_GD


def group_ends(cu_seqlens: Tensor, level: PoolLevel) -> Tensor:
    """Number of rows of its context that each group sees in a causal encoder: up to its own last row. int32 [G].

    In the reference, pooled query j sees rows 0 … j only.
    """
    num_groups = level.positions.numel()
    counts_C = (level.cu_seqlens[1:] - level.cu_seqlens[:-1]).long()
    starts_G = torch.repeat_interleave(cu_seqlens[:-1], counts_C, output_size=num_groups)
    return level.group_cu[1:] - starts_G


class Encoder(nn.Module):
    """Map token ids of packed contexts to pooled hidden states. It has no final norm and no head.

    config: sizes of the backbone.
    num_layers: number of first layers to keep.
    pooling: how the last layers pool.
    causal: causal instead of bidirectional attention. Only then do the backbone's windows apply; in pooled layers
        they count the rows of the level.
    memory_tokens: number of learned vectors appended to each context. If positive, no layer pools and only the outputs
        of these vectors are returned.
    activation_checkpointing: activations that backward recomputes.

    Raises ValueError on inconsistent arguments.
    """

    def __init__(
        self,
        config: BackboneConfig,
        *,
        num_layers: int,
        pooling: PoolingLayout,
        causal: bool = False,
        memory_tokens: int = 0,
        activation_checkpointing: Recompute = "none",
    ) -> None:
        super().__init__()
        num_pooled = 0 if memory_tokens else pooling.num_pooled_layers
        if not 0 < num_layers <= config.num_layers:
            raise ValueError(f"num_layers is {num_layers}; the backbone has {config.num_layers} layers")
        if num_pooled > num_layers:
            raise ValueError(f"{num_pooled} layers must pool but only {num_layers} are kept: use fewer factors")
        if num_pooled > 1 and pooling.where == "after":
            raise ValueError("pooling after the layer is for the last layer only: give one factor, or num_groups")
        if causal and not pooling.strategy.contiguous and not memory_tokens:
            raise ValueError("a causal encoder needs contiguous groups: choose mean, last, sum or fusion pooling")
        self.config = dataclasses.replace(config, num_layers=num_layers)
        self.causal = causal
        self.num_pooled_layers = num_pooled
        self.activation_checkpointing = activation_checkpointing
        self.tok_embeddings = TokenEmbedding(config.vocab_size, config.hidden_size)
        # A bidirectional encoder has no windows: a row sees its whole context, as in the paper.
        windows = [config.window_of(idx) if causal else None for idx in range(num_layers)]
        num_plain = num_layers - num_pooled
        selective = activation_checkpointing == "selective"
        plain = [Block(config, window, selective=selective) for window in windows[:num_plain]]
        pooled = [
            PooledBlock(config, pooling, window, causal=causal, selective=selective) for window in windows[num_plain:]
        ]
        self.layers = nn.ModuleList([*plain, *pooled])
        self.memory = nn.Parameter(torch.ones(memory_tokens, config.hidden_size)) if memory_tokens else None

    def forward(self, batch: PackedBatch) -> Tensor:
        """Hidden states [G, D] of all groups (or [C * memory_tokens, D]), context by context."""
        if len(batch.levels) != self.num_pooled_layers:
            raise ValueError(
                f"the batch is packed for {len(batch.levels)} pooled layers, but the encoder has "
                f"{self.num_pooled_layers}: pack with the encoder's own PoolingSpec"
            )
        multiplier = self.config.embedding_multiplier
        x_UD = self._embed(batch)
        stream = Stream(x_UD if multiplier == 1.0 else x_UD * multiplier)
        cu_seqlens = batch.encoder_cu_seqlens
        ropes = self._ropes(batch.encoder_positions, cu_seqlens, cu_seqlens)
        spans = Spans.within(cu_seqlens, batch.encoder_max_seqlen, causal=self.causal)
        num_plain = len(self.layers) - self.num_pooled_layers
        recomputes = self.activation_checkpointing == "full"
        for layer, rope in zip(self.layers[:num_plain], ropes[:num_plain], strict=True):
            stream = run_layer(layer, stream, rope, spans, recomputes=recomputes)
        for layer_idx, level in enumerate(batch.levels, start=num_plain):
            ropes_G = self._ropes(level.positions, level.cu_seqlens, cu_seqlens)
            pooled = ropes[layer_idx], ropes_G[layer_idx], spans, level
            stream = run_layer(self.layers[layer_idx], stream, *pooled, recomputes=recomputes)
            ropes, spans = ropes_G, Spans.within(level.cu_seqlens, level.max_seqlen, causal=self.causal)
        return stream.total_TD if self.memory is None else stream.total_TD[batch.memory_rows]

    def _ropes(self, positions: Tensor, cu_rows: Tensor, cu_seqlens: Tensor) -> tuple[Rope, ...]:
        """Rotary angles of the rows of one level, for each layer. The length of a sequence is that of its context."""
        lengths = lengths_of_rows(self.config, cu_rows, cu_seqlens, positions.numel())
        return ropes_at(positions, self.config, lengths)

    def _embed(self, batch: PackedBatch) -> Tensor:
        if self.memory is None:
            rows = torch.arange(batch.encoder_ids.numel(), device=batch.encoder_ids.device)
            return self.tok_embeddings(batch.encoder_ids, rows)
        assert batch.memory_rows is not None, "pack() makes memory rows if the spec has memory tokens"
        num_contexts = batch.encoder_cu_seqlens.numel() - 1
        return self.tok_embeddings(
            batch.encoder_ids, batch.token_rows, self.memory.repeat(num_contexts, 1), batch.memory_rows
        )

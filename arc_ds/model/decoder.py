"""The native decoder: a packed causal language model that reads compressed vectors between its token embeddings.

Shape letters: N text tokens, Z compressed vectors, R rows, L labels, D width, V vocabulary, B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from arc_ds.batch.packing import PackedBatch, PrefixSplit
from arc_ds.model.backbone import (
    Block,
    Cache,
    DecoderBlock,
    Head,
    Prefix,
    PrefixPass,
    Recompute,
    Spans,
    Stream,
    TokenEmbedding,
    make_norm,
    run_layer,
)
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.decoder_adapters import DecoderLora, drop_adapters, give_adapters
from arc_ds.model.frozen_decoder import FrozenDecoder, sequences_of_rows
from arc_ds.model.kv_cache import KVCache, RecordedRows, SharedRows, prompt_rows
from arc_ds.model.rope import depends_on_length, lengths_of_rows, ropes_at


class Decoder(FrozenDecoder):
    """A frozen decoder that our packed transformer computes.

    activation_checkpointing: activations that backward recomputes.
    is_adapted: whether its linears have trained adapters.
    """

    implementation = "native"

    def __init__(self, config: BackboneConfig, *, activation_checkpointing: Recompute = "none") -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.is_adapted = False
        self.tok_embeddings = TokenEmbedding(config.vocab_size, config.hidden_size)
        selective = activation_checkpointing == "selective"
        self.layers = nn.ModuleList(
            DecoderBlock(config, config.window_of(idx), selective=selective) for idx in range(config.num_layers)
        )
        self.norm = make_norm(config)
        self.output = Head(config.vocab_size, config.hidden_size, config.logits_multiplier)
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.requires_grad_(False)

    def use_adapters(self, spec: DecoderLora, tensors: Sequence[Tensor]) -> None:
        """Compute with these adapters from now on. tensors: from `DecoderAdapters`."""
        give_adapters(self.layers, spec, tensors)
        self.is_adapted = True

    def use_no_adapters(self, *, merged: bool = False) -> None:
        """Compute without adapters from now on. merged: add them to the weights first."""
        if self.is_adapted:
            drop_adapters(self.layers, merged=merged)
        self.is_adapted = False

    @property
    def sizes(self) -> BackboneConfig:
        return self.config

    @property
    def layer_types(self) -> tuple[type[nn.Module], ...]:
        return (Block,)

    @property
    def cache_row_bytes(self) -> int:
        config = self.config
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * self.tok_embeddings.weight.element_size()

    def forward(self, batch: PackedBatch, z_ZD: Tensor | None) -> Tensor:
        """NLL in nats of each label of the batch, float32 [L]; `z_ZD` are the compressed vectors (None: text only)."""
        return self.output(self.norm(self.hidden(batch, z_ZD)[batch.label_rows]), batch.labels)

    def logits(self, batch: PackedBatch, z_ZD: Tensor | None, rows: Tensor) -> Tensor:
        """Logits of the given rows (int64 [n]): float32 [n, V]."""
        return self.output(self.norm(self.hidden(batch, z_ZD)[rows]))

    def hidden(self, batch: PackedBatch, z_ZD: Tensor | None) -> Tensor:
        """Last hidden states before the final norm, [R, D]; `z_ZD` are the compressed vectors (None: text only).

        In training, rows before a sequence's first compressed row run without gradient (`packing.PrefixSplit`), unless
        there are adapters, which these rows train too.
        """
        x_RD, split = self.embed(batch, z_ZD), None if self.is_adapted else batch.prefix
        if split is not None and torch.is_grad_enabled() and x_RD.requires_grad:
            return self._hidden_by_parts(x_RD, batch, split)
        spans = Spans.within(batch.decoder_cu_seqlens, batch.decoder_max_seqlen, causal=True)
        return self.run_layers(x_RD, batch.decoder_positions, spans)

    def embed(self, batch: PackedBatch, z_ZD: Tensor | None) -> Tensor:
        """Token embeddings with the compressed vectors between them, [R, D]: the `inputs_embeds` of transformers."""
        rows_Z = None if z_ZD is None else batch.compressed_rows
        return self.tok_embeddings(batch.decoder_ids, batch.text_rows, z_ZD, rows_Z)

    def run_layers(
        self,
        x_RD: Tensor,
        positions_R: Tensor,
        spans: Spans,
        caches: Sequence[Cache] | None = None,
        max_len: int | None = None,
    ) -> Tensor:
        """Run all layers on embedded rows: the last hidden states before the final norm, [R, D].

        positions_R: position of each row in its sequence, int64.
        caches: one cache per layer, outside training only. The keys of `spans` are then those of the cache.
        max_len: length of every sequence for rotary scalings that depend on it. None: the number of its keys.

        During generation `max_len` is the longest prompt and all new tokens. transformers takes the largest position so
        far of all prompts instead, and Phi-3 computes its cache anew when it passes the bound.
        """
        cu_lengths = spans.cu_seqlens_k
        if max_len is not None:
            cu_lengths = torch.arange(cu_lengths.numel(), device=cu_lengths.device, dtype=torch.int32) * max_len
        lengths_R = lengths_of_rows(self.config, spans.cu_seqlens_q, cu_lengths, positions_R.numel())
        ropes = ropes_at(positions_R, self.config, lengths_R)
        stream = self._enter(x_RD)
        for layer_idx, (layer, rope) in enumerate(zip(self.layers, ropes, strict=True)):
            stream = self._run(layer, stream, rope, spans, None if caches is None else caches[layer_idx])
        return stream.total_TD

    def _enter(self, x_RD: Tensor) -> Stream:
        """The input of the first layer, from embedded rows."""
        multiplier = self.config.embedding_multiplier
        return Stream(x_RD if multiplier == 1.0 else x_RD * multiplier)

    def _hidden_by_parts(self, x_RD: Tensor, batch: PackedBatch, split: PrefixSplit) -> Tensor:
        """Run each layer on the prefixes without gradient, then on the suffixes, which attend to both."""
        cu_seqlens = batch.decoder_cu_seqlens
        lengths_R = lengths_of_rows(self.config, cu_seqlens, cu_seqlens, batch.num_decoder_rows)
        prefix_ropes, suffix_ropes = (
            ropes_at(batch.decoder_positions[rows], self.config, None if lengths_R is None else lengths_R[rows])
            for rows in (split.prefix_rows, split.suffix_rows)
        )
        prefix = Prefix(
            rows=split.prefix_rows,
            suffix_rows=split.suffix_rows,
            spans=Spans.within(split.prefix_cu_seqlens, split.prefix_max_seqlen, causal=True),
        )
        suffix_spans = Spans(
            cu_seqlens_q=split.suffix_cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=split.suffix_max_seqlen,
            max_seqlen_k=batch.decoder_max_seqlen,
            causal=True,
        )
        before, after = self._enter(x_RD[split.prefix_rows].detach()), self._enter(x_RD[split.suffix_rows])
        for layer, prefix_rope, suffix_rope in zip(self.layers, prefix_ropes, suffix_ropes, strict=True):
            passing = PrefixPass(prefix, prefix_rope, before)
            # As keywords: DeepSpeed's hooks search positional arguments for tensors.
            after = self._run(layer, after, rope=suffix_rope, spans=suffix_spans, cache=passing)
            before = passing.take()  # a layer that backward recomputes keeps `passing` alive
        return prefix.join(before.total_TD, after.total_TD)

    def _run(self, layer: nn.Module, stream: Stream, *args: Any, **kwargs: Any) -> Stream:
        recomputes = self.activation_checkpointing == "full" and stream.x_TD.requires_grad
        return run_layer(layer, stream, *args, recomputes=recomputes, **kwargs)

    def prefill(
        self,
        batch: PackedBatch,
        z_ZD: Tensor | None,
        max_new_tokens: int,
        shared: SharedRows | None = None,
        max_len: int | None = None,
    ) -> tuple[Tensor, KVCache]:
        max_own = batch.decoder_max_seqlen + max_new_tokens
        cache = KVCache(
            self.config,
            self.tok_embeddings.weight,
            lengths_B=batch.decoder_cu_seqlens.diff().long(),
            num_own=batch.decoder_max_seqlen,
            max_own=max_own,
            max_len=max_len or max_own + (0 if shared is None else shared.num_rows),
            shared=shared,
        )
        h_RD = self._read_prompts(batch, z_ZD, shared, cache)
        return self.output(self.norm(h_RD[batch.decoder_cu_seqlens[1:].long() - 1])), cache

    def advance(self, ids_B: Tensor, state: KVCache) -> Tensor:
        num_sequences, device = ids_B.numel(), ids_B.device
        cu = torch.arange(num_sequences + 1, device=device, dtype=torch.int32)
        positions_B, max_own = state.lengths_B + state.num_shared, state.layers[0].keys.shape[1]
        limits = (positions_B + 1).to(torch.int32)  # read by the kernel only, which has no shared rows
        spans = Spans(cu, cu * max_own, 1, max_own, k_limits=limits) if state.by_kernel else Spans(cu, cu, 1, 1)
        x_BD = self.tok_embeddings(ids_B, torch.arange(num_sequences, device=device))
        h_BD = self.run_layers(x_BD, positions_B, spans, state.at_step(), state.max_len)
        return self.output(self.norm(h_BD))

    def read_shared(self, batch: PackedBatch, z_ZD: Tensor | None, max_len: int | None) -> SharedRows | None:
        if not depends_on_length(self.config):
            max_len = None
        elif max_len is None:
            return None
        spans = Spans.within(batch.decoder_cu_seqlens, batch.decoder_max_seqlen, causal=True)
        caches = [RecordedRows() for _ in self.layers]
        self.run_layers(self.embed(batch, z_ZD), batch.decoder_positions, spans, caches, max_len)
        layers = [cache.rows for cache in caches if cache.rows is not None]
        return SharedRows(layers, batch.num_decoder_rows, max_len)

    def keep(self, state: KVCache, sequences: Tensor) -> bool:
        state.keep(sequences)
        return True

    def label_nll(self, batch: PackedBatch, z_ZD: Tensor | None, shared: SharedRows | None = None) -> Tensor:
        if shared is None:
            return super().label_nll(batch, z_ZD)
        h_RD = self._read_prompts(batch, z_ZD, shared)
        return self.output(self.norm(h_RD[batch.label_rows]), batch.labels)

    def _read_prompts(
        self, batch: PackedBatch, z_ZD: Tensor | None, shared: SharedRows | None, cache: KVCache | None = None
    ) -> Tensor:
        """Last hidden states of packed prompts after shared rows, [R, D]. The cache, if any, keeps their keys."""
        num_shared, places_R = 0 if shared is None else shared.num_rows, batch.decoder_positions
        cu_keys, caches = prompt_rows(
            batch.decoder_cu_seqlens,
            sequences_of_rows(batch),
            places_R,
            shared,
            None if cache is None else cache.by_head(),
            self.config.num_layers,
        )
        longest = batch.decoder_max_seqlen
        spans = Spans(batch.decoder_cu_seqlens, cu_keys, longest, longest + num_shared, causal=True)
        max_len = None if cache is None else cache.max_len
        return self.run_layers(self.embed(batch, z_ZD), places_R + num_shared, spans, caches, max_len)

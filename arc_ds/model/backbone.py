"""The packed transformer: building blocks of encoder and decoder.

Sequences are concatenated along dimension 0 and attention follows `cu_seqlens`. There is no padding and no loop over
sequences.

Shape letters: T query rows, U key rows, D width, N heads, K kv heads, H head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import arc_kernels as ak
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.kv_cache import LayerCache, PromptRows, RecordedRows, StepRows
from arc_ds.model.linear import Linear, Recomputed, joint_linear
from arc_ds.model.rope import Rope

# Activations that backward recomputes; see `schema.EncoderConfig` and `schema.DecoderConfig`.
Recompute = Literal["none", "selective", "full"]


class Spans(NamedTuple):
    """Segment boundaries of queries and keys; see `arc_kernels.attention_varlen`."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool = False
    k_limits: Tensor | None = None

    @staticmethod
    def within(cu_seqlens: Tensor, max_seqlen: int, *, causal: bool) -> Spans:
        """Every segment attends to itself."""
        return Spans(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal)


class Prefix(NamedTuple):
    """The first rows of causal sequences, which need no gradient; all others are the suffix (`packing.PrefixSplit`).

    rows: rows of the prefix in the packed order, int64.
    suffix_rows: rows of the suffix in the packed order, int64.
    spans: spans of the prefix.
    """

    rows: Tensor
    suffix_rows: Tensor
    spans: Spans

    def join(self, prefix: Tensor, suffix: Tensor) -> Tensor:
        """The rows of both parts in the packed order."""
        return _Join.apply(prefix, suffix, self.rows, self.suffix_rows)


class _Join(torch.autograd.Function):
    """Write two sets of rows into one tensor in one pass. `index_put` under autograd would first copy the tensor."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, first_rows: Tensor, second_rows: Tensor) -> Tensor:
        ctx.save_for_backward(first_rows, second_rows)
        whole = second.new_empty(first.shape[0] + second.shape[0], *second.shape[1:])
        return whole.index_copy_(0, first_rows, first).index_copy_(0, second_rows, second)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = zip(ctx.needs_input_grad[:2], ctx.saved_tensors, strict=True)
        return *(grads[0].index_select(0, rows) if is_wanted else None for is_wanted, rows in wanted), None, None


class Stream(NamedTuple):
    """The residual stream between two layers, as two terms. The next norm adds them, because it reads both anyway.

    x_TD: residual [T, D].
    update_TD: output of the last sublayer [T, D]; None if it is already added to x_TD.
    """

    x_TD: Tensor
    update_TD: Tensor | None = None

    @property
    def total_TD(self) -> Tensor:
        return self.x_TD if self.update_TD is None else self.x_TD + self.update_TD


@dataclass
class PrefixPass:
    """The state of the prefix in one frozen layer. The suffix reads its keys and values like a cache.

    prefix: the rows of the prefix.
    rope: rotary angles of the prefix in this layer.
    stream: input of the layer before its forward, output after it; None after `take`.
    keys_values: rotated keys and values of the prefix, [P, K, H] each; None before the first forward. If activation
        checkpointing reruns the layer, it reuses them: the suffix needs nothing else of the prefix.
    """

    prefix: Prefix
    rope: Rope
    stream: Stream | None
    keys_values: tuple[Tensor, Tensor] | None = None

    def take(self) -> Stream:
        """Return the prefix's stream and drop the reference to it."""
        assert self.stream is not None, "a prefix can be taken only once"
        stream, self.stream = self.stream, None
        return stream

    def update(self, k_QKH: Tensor, v_QKH: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all rows, from those of the suffix."""
        assert self.keys_values is not None, "the prefix runs before the suffix"
        k_PKH, v_PKH = self.keys_values
        return self.prefix.join(k_PKH, k_QKH), self.prefix.join(v_PKH, v_QKH)


Cache = LayerCache | PromptRows | RecordedRows | StepRows | PrefixPass


class RMSNorm(nn.Module):
    """RMSNorm with a trained or frozen weight [D]."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return ak.rms_norm(x_TD, self.weight, self.eps)

    def add(self, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum)."""
        return ak.add_rms_norm(x_TD, residual_TD, self.weight, self.eps)


class LayerNorm(nn.Module):
    """LayerNorm without parameters (OLMo-1)."""

    weight = None

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return ak.layer_norm(x_TD, self.eps)

    def add(self, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum)."""
        return ak.add_layer_norm(x_TD, residual_TD, self.eps)


Norm = RMSNorm | LayerNorm


def make_norm(config: BackboneConfig) -> Norm:
    """The kind of norm that the config names."""
    return RMSNorm(config.hidden_size, config.norm_eps) if config.norm == "rms" else LayerNorm(config.norm_eps)


class Attention(nn.Module):
    """Grouped-query attention. Queries may come from different rows than keys and values.

    window: see `BackboneConfig`; None if queries see all keys that the spans allow.
    """

    def __init__(self, config: BackboneConfig, window: int | None) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.scale = config.attention_scale
        self.clip = config.clip_qkv
        self.qk_norm = config.qk_norm
        self.window = window
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.wq = Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.wk = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.wv = Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.wo = Linear(q_size, config.hidden_size, bias=config.output_bias)
        sizes = {None: (), "head": (config.head_dim, config.head_dim), "row": (q_size, kv_size)}[config.qk_norm]
        norms: list[RMSNorm | None] = [RMSNorm(size, config.norm_eps) for size in sizes] or [None, None]
        self.q_norm, self.k_norm = norms

    def forward(
        self,
        x_TD: Tensor | Recomputed,
        kv_UD: Tensor | Recomputed,
        rope_q: Rope,
        rope_k: Rope,
        spans: Spans,
        cache: Cache | None = None,
    ) -> Tensor:
        """The output [T, D]. The keys of `spans` are the rows of `kv_UD`, or those of the cache."""
        if x_TD is kv_UD:
            q_TNH, k_UKH, v_UKH = self.project(x_TD)
        else:
            (q_TNH,) = self._heads(x_TD, self.wq)
            k_UKH, v_UKH = self._heads(kv_UD, self.wk, self.wv)
        if cache is None:
            return self.attend(q_TNH, k_UKH, v_UKH, rope_q, spans, rope_k)
        k_UKH = ak.rotary(k_UKH, *rope_k.keys)
        if isinstance(cache, StepRows):
            q_TNH = ak.rotary(q_TNH, *rope_q.queries)
            return self.wo(cache.attend(q_TNH, k_UKH, v_UKH, window=self.window, scale=self.scale).flatten(1))
        return self.attend(q_TNH, *cache.update(k_UKH, v_UKH), rope_q, spans)

    def project(self, x_TD: Tensor | Recomputed) -> tuple[Tensor, ...]:
        """Queries [T, N, H], keys and values [T, K, H] of the rows, before rotation."""
        return self._heads(x_TD, self.wq, self.wk, self.wv)

    def attend(
        self, q_TNH: Tensor, k_UKH: Tensor, v_UKH: Tensor, rope_q: Rope, spans: Spans, rope_k: Rope | None = None
    ) -> Tensor:
        """The output of the attention: [T, D].

        rope_q: angles that rotate the queries.
        rope_k: angles that rotate the keys; None if the keys are already rotated.
        """
        o_TNH = ak.attention_varlen(
            q_TNH,
            k_UKH,
            v_UKH,
            cu_seqlens_q=spans.cu_seqlens_q,
            cu_seqlens_k=spans.cu_seqlens_k,
            max_seqlen_q=spans.max_seqlen_q,
            max_seqlen_k=spans.max_seqlen_k,
            causal=spans.causal,
            k_limits_T=spans.k_limits,
            window=self.window,
            scale=self.scale,
            rotary_q=rope_q.queries,
            rotary_k=None if rope_k is None else rope_k.keys,
        )
        return self.wo(o_TNH.flatten(1))

    def _heads(self, x_TD: Tensor | Recomputed, *linears: Linear) -> tuple[Tensor, ...]:
        norms = {self.wq: self.q_norm, self.wk: self.k_norm}
        rows = zip(linears, joint_linear(x_TD, linears), strict=True)
        return tuple(self._split(y_TX, norms.get(linear)) for linear, y_TX in rows)

    def _split(self, y_TX: Tensor, norm: RMSNorm | None) -> Tensor:
        """The heads of one projection [T, heads, H], clipped and normalized."""
        if self.clip is not None:
            y_TX = y_TX.clamp(-self.clip, self.clip)
        if norm is not None and self.qk_norm == "row":
            y_TX = norm(y_TX)
        y_TNH = y_TX.unflatten(-1, (-1, self.head_dim))
        return norm(y_TNH) if norm is not None and self.qk_norm == "head" else y_TNH


class FeedForward(nn.Module):
    """w2(silu(w1 x) * w3 x).

    frozen: w1 and w3 are frozen. If the input is recomputed, so are their products, unless they have adapters.
    """

    def __init__(self, config: BackboneConfig, *, frozen: bool) -> None:
        super().__init__()
        self.frozen = frozen
        self.w1 = Linear(config.hidden_size, config.ffn_size, bias=config.ffn_bias)
        self.w2 = Linear(config.ffn_size, config.hidden_size, bias=config.ffn_bias)
        self.w3 = Linear(config.hidden_size, config.ffn_size, bias=config.ffn_bias)

    def forward(self, x_TD: Tensor | Recomputed) -> Tensor:
        if not isinstance(x_TD, Recomputed):
            return self.w2(ak.swiglu(*joint_linear(x_TD, (self.w1, self.w3))))
        if not self.frozen or self.w1.adapter is not None:
            return self.w2(Recomputed(ak.swiglu, joint_linear(x_TD, (self.w1, self.w3))))
        normed = x_TD.recipe
        return self.w2(Recomputed(lambda *x: ak.swiglu(*joint_linear(normed(*x), (self.w1, self.w3))), x_TD.inputs))


class Block(nn.Module):
    """One layer: x + attention(norm x), then + feed-forward(norm). See `BackboneConfig.norm_place` for the other order.

    window: see `Attention`.
    selective: recompute in backward what costs least for its memory. A trained layer keeps the results of its matrix
        products and computes normed rows and the FFN's product again. A frozen layer keeps neither, so it computes the
        FFN up to its last product again.
    """

    frozen = False

    def __init__(self, config: BackboneConfig, window: int | None = None, *, selective: bool = False) -> None:
        super().__init__()
        self.selective = selective
        self.norms_output = config.norm_place == "output"
        self.residual_multiplier = config.residual_multiplier
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, window)
        self.ffn_norm = make_norm(config)
        self.feed_forward = FeedForward(config, frozen=self.frozen)

    def forward(
        self, x_TD: Tensor, update_TD: Tensor | None, rope: Rope, spans: Spans, cache: Cache | None = None
    ) -> Stream:
        """Run the layer on a stream. Its terms are separate arguments: ZeRO-3 hooks and checkpointing need tensors."""
        input_TD, x_TD = self._enter(x_TD, update_TD)
        return self._finish(self.attention(input_TD, input_TD, rope, rope, spans, cache), x_TD)

    def _enter(self, x_TD: Tensor, update_TD: Tensor | None) -> tuple[Tensor | Recomputed, Tensor]:
        """(input of the attention, the sum of the stream's terms)."""
        if self.norms_output:
            total_TD = Stream(x_TD, update_TD).total_TD
            return total_TD, total_TD
        if self._recomputes and not self.frozen:
            total_TD = Stream(x_TD, update_TD).total_TD
            return self._recomputed(self.attention_norm, total_TD), total_TD
        return (self.attention_norm(x_TD), x_TD) if update_TD is None else self.attention_norm.add(update_TD, x_TD)

    def _finish(self, attended_TD: Tensor, residual_TD: Tensor) -> Stream:
        """The stream after the layer, from the output of the attention."""
        if self.norms_output or self._recomputes:
            return self._feed(residual_TD + self._update(attended_TD, self.attention_norm))
        normed_TD, total_TD = self.ffn_norm.add(self._update(attended_TD, self.attention_norm), residual_TD)
        return Stream(total_TD, self._update(self.feed_forward(normed_TD), self.ffn_norm))

    def _feed(self, x_TD: Tensor) -> Stream:
        """The stream after the feed-forward layer, from the rows before it."""
        if self._recomputes:
            input_TD: Tensor | Recomputed = self._recomputed(None if self.norms_output else self.ffn_norm, x_TD)
        else:
            input_TD = x_TD if self.norms_output else self.ffn_norm(x_TD)
        return Stream(x_TD, self._update(self.feed_forward(input_TD), self.ffn_norm))

    @property
    def _recomputes(self) -> bool:
        return self.selective and torch.is_grad_enabled()

    def _recomputed(self, norm: Norm | None, x_TD: Tensor) -> Recomputed:
        """The input of a sublayer from the rows before its norm."""
        weight = None if norm is None or self.frozen else norm.weight
        return Recomputed(norm or _same, (x_TD,), () if weight is None else (weight,))

    def _update(self, output_TD: Tensor, norm: Norm) -> Tensor:
        """The update of the residual, from the output of a sublayer."""
        update_TD = norm(output_TD) if self.norms_output else output_TD
        return update_TD if self.residual_multiplier == 1.0 else update_TD * self.residual_multiplier


def _same(x_TD: Tensor) -> Tensor:
    return x_TD


class DecoderBlock(Block):
    """A frozen layer that can also run a prefix without gradient and a suffix with gradient."""

    frozen = True

    def forward(
        self, x_TD: Tensor, update_TD: Tensor | None, rope: Rope, spans: Spans, cache: Cache | None = None
    ) -> Stream:
        """Run the layer on a stream. If the cache is a `PrefixPass`, the stream is the suffix; the prefix advances too.

        The keys of `spans` are then those of all rows.
        """
        if isinstance(cache, PrefixPass) and cache.keys_values is None:
            cache.keys_values = self._run_prefix(cache)
        return super().forward(x_TD, update_TD, rope, spans, cache)

    @torch.no_grad()
    def _run_prefix(self, cache: PrefixPass) -> tuple[Tensor, Tensor]:
        """Run the layer on the prefix and return its keys and values."""
        rope, spans = cache.rope, cache.prefix.spans
        input_PD, x_PD = self._enter(*cache.take())
        q_PNH, k_PKH, v_PKH = self.attention.project(input_PD)
        k_PKH = ak.rotary(k_PKH, *rope.keys)
        cache.stream = self._finish(self.attention.attend(q_PNH, k_PKH, v_PKH, rope, spans), x_PD)
        return k_PKH, v_PKH


def run_layer(layer: nn.Module, stream: Stream, *args: Any, recomputes: bool, **kwargs: Any) -> Stream:
    """Run a layer on a stream. recomputes: whether backward recomputes the whole layer."""
    if recomputes and torch.is_grad_enabled():
        # Checkpointing saves the layer's input. The sum is one tensor instead of two.
        return checkpoint(layer, stream.total_TD, None, *args, use_reentrant=False, **kwargs)
    return layer(*stream, *args, **kwargs)


class TokenEmbedding(nn.Module):
    """The embedding table [V, D]. Its forward can splice other rows between the token embeddings."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(
        self, ids_N: Tensor, rows_N: Tensor, given_ZD: Tensor | None = None, given_rows_Z: Tensor | None = None
    ) -> Tensor:
        """Rows [N + Z, D]; see `arc_kernels.splice`."""
        return ak.splice(self.weight, ids_N, rows_N, given_ZD, given_rows_Z)


class Head(nn.Module):
    """The frozen output layer. The loss is computed in its forward, because ZeRO-3 gathers the weight only there.

    multiplier: factor of the logits.
    """

    def __init__(self, vocab_size: int, width: int, multiplier: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))
        self.multiplier = multiplier

    def forward(self, h_LD: Tensor, labels_L: Tensor | None = None) -> Tensor:
        """NLL of each label, float32 [L]. Without labels: logits, float32 [L, V]."""
        if self.multiplier != 1.0:
            h_LD = h_LD * self.multiplier
        if labels_L is not None:
            return ak.linear_cross_entropy(h_LD, self.weight, labels_L)
        return (h_LD @ self.weight.T).float()

"""The attention cases: an encoder layer, its pooled layer, and a decoder layer without and with a sliding window.

Segments are ragged.

Shape letters: T query rows, U key rows, N heads, K kv heads, H head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from gpu_cases import BYTES, Case, Floor, Function, Scale, angles, normal
from torch import Tensor

import arc_kernels as ak

VARLEN = "varlen_attn (torch)"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The attention of one layer: heads, and lengths of the segments of queries and keys."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    causal: bool
    window: int | None = None

    def pairs(self) -> int:
        """Number of visible (query, key) pairs of one head."""
        segments = zip(self.queries, self.keys, strict=True)
        if not self.causal:
            return sum(m * n for m, n in segments)
        return sum(min(n - i, self.window or n) for m, n in segments for i in range(m))

    def flash_window(self) -> tuple[int, int]:
        """Numbers of keys before and after a query's own, as FlashAttention takes them; -1 stands for all."""
        return (self.window - 1 if self.window else -1, 0 if self.causal else -1)


def attention_cases(scale: Scale) -> Iterator[Case]:
    """Llama 3.2 3B as encoder, whose last layer has pooled queries (factor 8), and Llama 3.1 8B as decoder.

    The decoder comes once more with a window.
    """
    encoders = [
        Layer(name="encoder", num_heads=24, num_kv_heads=8, head_dim=128, queries=lengths, keys=lengths, causal=False)
        for lengths in scale.lengths
    ]
    for encoder in encoders:
        yield attention_case(replace(encoder, name="decoder", num_heads=32, causal=True))
        yield attention_case(encoder)
    for encoder in encoders:
        yield attention_case(replace(encoder, name="pooled", queries=tuple(-(-n // 8) for n in encoder.keys)))
    yield _rotary_case(encoders[-1])
    decoder = replace(encoders[-1], name="window", num_heads=32, causal=True, window=scale.window)
    yield attention_case(decoder)


def attention_case(layer: Layer) -> Case:
    """One layer with our kernel and the baselines."""

    def inputs(device: torch.device) -> dict[str, Tensor]:
        rows_q, rows_k = sum(layer.queries), sum(layer.keys)
        kv = (rows_k, layer.num_kv_heads, layer.head_dim)
        q, k, v = normal(device, (rows_q, layer.num_heads, layer.head_dim), kv, kv)
        boundaries = {"cu_seqlens_q": _cu(layer.queries, device), "cu_seqlens_k": _cu(layer.keys, device)}
        return {"q_TNH": q, "k_UKH": k, "v_UKH": v, **boundaries}

    function = partial(
        ak.attention_varlen,
        max_seqlen_q=max(layer.queries),
        max_seqlen_k=max(layer.keys),
        causal=layer.causal,
        window=layer.window,
    )
    rows = 2 * sum(layer.queries) * layer.num_heads + 2 * sum(layer.keys) * layer.num_kv_heads  # q, o; k, v
    mask = (" causal" if layer.causal else "") + (f" window={layer.window}" if layer.window else "")
    product = 2 * layer.pairs() * layer.num_heads * layer.head_dim
    return Case(
        kernel="attention",
        shape=(
            f"{layer.name} N={layer.num_heads} K={layer.num_kv_heads} H={layer.head_dim} "
            f"T={sum(layer.queries)} U={sum(layer.keys)} S={len(layer.keys)}{mask}"
        ),
        function=function,
        inputs=inputs,
        wants_grad=("q_TNH", "k_UKH", "v_UKH"),
        # Two products in forward and five in backward, as FlashAttention counts them.
        floor=Floor(
            forward_bytes=rows * layer.head_dim * BYTES,
            backward_bytes=2 * rows * layer.head_dim * BYTES,
            forward_flops=2 * product,
            backward_flops=5 * product,
        ),
        baselines={
            VARLEN: partial(varlen, layer),
            "FlexAttention": partial(_flex, layer),
        }
        | ({} if layer.window else {"SDPA, a loop": partial(_sdpa_loop, layer)})  # its windows need a dense mask
        | ({"FlashAttention-3": partial(_flash3, layer)} if find_spec("flash_attn_interface") else {}),
        is_compiled=False,  # nearly all of its time is that of scaled_dot_product_attention, which stays as it is
        compiled_baselines=frozenset({"FlexAttention"}),
    )


def _rotary_case(layer: Layer) -> Case:
    """The same layer with rotary embedding of queries and keys."""
    plain = attention_case(layer)

    def inputs(device: torch.device) -> dict[str, Tensor]:
        rotations = {}
        for side, lengths in (("q", layer.queries), ("k", layer.keys)):
            cos, sin = angles(_places(lengths, device)[1], layer.head_dim)
            rotations |= {f"cos_{side}": cos, f"sin_{side}": sin}
        return plain.inputs(device) | rotations

    return replace(
        plain,
        kernel="attention_rotary",
        function=partial(_turned_inside, plain.function),
        inputs=inputs,
        baselines={
            "rotary before": partial(_turned_before, plain.function),
            f"rotary, {VARLEN}": partial(_turned_before, partial(varlen, layer)),
        },
        compiled_baselines=frozenset(),
    )


def _turned_inside(
    attention: Function, *, cos_q: Tensor, sin_q: Tensor, cos_k: Tensor, sin_k: Tensor, **inputs: Tensor
) -> Tensor:
    return attention(**inputs, rotary_q=(cos_q, sin_q), rotary_k=(cos_k, sin_k))


def _turned_before(
    attention: Function,
    *,
    q_TNH: Tensor,
    k_UKH: Tensor,
    cos_q: Tensor,
    sin_q: Tensor,
    cos_k: Tensor,
    sin_k: Tensor,
    **inputs: Tensor,
) -> Tensor:
    return attention(q_TNH=ak.rotary(q_TNH, cos_q, sin_q), k_UKH=ak.rotary(k_UKH, cos_k, sin_k), **inputs)


def _cu(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def varlen(
    layer: Layer, q_TNH: Tensor, k_UKH: Tensor, v_UKH: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> Tensor:
    """FlashAttention as PyTorch has it.

    Our backend "flash" needs a later torch, so this calls torch directly. Up to 2.11 `varlen_attn` has no argument for
    grouped heads, but its kernels accept them.
    """
    from torch.nn.attention.varlen import varlen_attn

    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    spans = (cu_seqlens_q, cu_seqlens_k, max(layer.queries), max(layer.keys))
    return varlen_attn(q_TNH, k_UKH, v_UKH, *spans, window_size=layer.flash_window(), **grouped)


def _sdpa_loop(layer: Layer, q_TNH: Tensor, k_UKH: Tensor, v_UKH: Tensor, **_: Tensor) -> Tensor:
    """One call of scaled_dot_product_attention per segment."""
    outputs = []
    split = zip(q_TNH.split(layer.queries), k_UKH.split(layer.keys), v_UKH.split(layer.keys), strict=True)
    for segment in split:
        q, k, v = (x.transpose(0, 1)[None] for x in segment)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=layer.causal, enable_gqa=True)
        outputs.append(o[0].transpose(0, 1))
    return torch.cat(outputs)


def _flash3(
    layer: Layer, q_TNH: Tensor, k_UKH: Tensor, v_UKH: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> Tensor:
    """FlashAttention-3 from its own package."""
    from flash_attn_interface import flash_attn_varlen_func

    result = flash_attn_varlen_func(
        q_TNH,
        k_UKH,
        v_UKH,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max(layer.queries),
        max_seqlen_k=max(layer.keys),
        causal=layer.causal,
        window_size=layer.flash_window() if layer.window else (-1, -1),
    )
    return result if isinstance(result, Tensor) else result[0]


def _flex(layer: Layer, q_TNH: Tensor, k_UKH: Tensor, v_UKH: Tensor, **_: Tensor) -> Tensor:
    """Compiled FlexAttention over all segments as one sequence. The first call creates its block mask."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q_TNH, k_UKH, v_UKH))
    o = _compiled_flex()(q, k, v, block_mask=_block_mask(layer, q.device), enable_gqa=True)
    return o[0].transpose(0, 1)


@cache
def _compiled_flex() -> Function:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@cache
def _block_mask(layer: Layer, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    mask = _segment_mask(layer, device)
    # Eagerly: this takes a few GB for a moment. Compiling it would take seconds for each shape.
    return create_block_mask(mask, None, None, sum(layer.queries), sum(layer.keys), device=device)


def _segment_mask(layer: Layer, device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention's mask function: whether a query row sees a key row."""
    query_segment, query_place = _places(layer.queries, device)
    key_segment, key_place = _places(layer.keys, device)

    def sees(_batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        same = query_segment[row] == key_segment[key]
        if not layer.causal:
            return same
        ahead = query_place[row] - key_place[key]
        return same & (ahead >= 0) & (ahead < (layer.window or max(layer.keys)))

    return sees


def _places(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Segment of each row and its index in that segment."""
    sizes = torch.tensor(lengths, device=device)
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=device), sizes)
    starts = sizes.cumsum(0) - sizes
    return segment, torch.arange(sum(lengths), device=device) - starts[segment]

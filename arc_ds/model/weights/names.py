"""Internal names and shapes of a backbone's parameters, and the exact permutation between the two rotary layouts.

Every linear weight is [out, in]. w1 is the gate projection, w3 the up and w2 the down projection.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from arc_ds.model.backbone_config import BackboneConfig

Shape = tuple[int, ...]
RotaryPairs = Literal["half", "interleaved"]
NamePredicate = Callable[[str], bool]
_MAX_LISTED = 20
_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9]\d*)(?=\.)")
_ROTATED = re.compile(r"attention\.(wq|wk|q_norm|k_norm)\.(?:weight|bias)$")


def layer_shapes(config: BackboneConfig) -> dict[str, Shape]:
    """Shapes of the parameters of one layer, by name without `layers.{i}.`."""
    hidden, ffn = config.hidden_size, config.ffn_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, Shape] = {
        "attention.wq.weight": (q_rows, hidden),
        "attention.wk.weight": (kv_rows, hidden),
        "attention.wv.weight": (kv_rows, hidden),
        "attention.wo.weight": (hidden, q_rows),
        "feed_forward.w1.weight": (ffn, hidden),
        "feed_forward.w2.weight": (hidden, ffn),
        "feed_forward.w3.weight": (ffn, hidden),
    }
    biased = {
        ("attention.wq", "attention.wk", "attention.wv"): config.qkv_bias,
        ("attention.wo",): config.output_bias,
        ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"): config.ffn_bias,
    }
    for linears, is_biased in biased.items():
        if is_biased:
            shapes.update({f"{linear}.bias": shapes[f"{linear}.weight"][:1] for linear in linears})
    if config.qk_norm is not None:
        by_row = config.qk_norm == "row"
        shapes["attention.q_norm.weight"] = (q_rows if by_row else config.head_dim,)
        shapes["attention.k_norm.weight"] = (kv_rows if by_row else config.head_dim,)
    if config.norm == "rms":
        shapes["attention_norm.weight"] = (hidden,)
        shapes["ffn_norm.weight"] = (hidden,)
    return shapes


def backbone_shapes(config: BackboneConfig) -> dict[str, Shape]:
    """Shapes of all parameters of a backbone by internal name, in forward order.

    `output.weight` is absent if the head is tied to the embedding. Norm weights are absent if the norm has none.
    """
    shapes: dict[str, Shape] = {"tok_embeddings.weight": (config.vocab_size, config.hidden_size)}
    for i in range(config.num_layers):
        shapes.update({f"layers.{i}.{name}": shape for name, shape in layer_shapes(config).items()})
    if config.norm == "rms":
        shapes["norm.weight"] = (config.hidden_size,)
    if not config.tie_embeddings:
        shapes["output.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def shape_faults(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> list[str]:
    """Phrases that name each expected tensor that is missing or has another shape."""
    return [
        f"`{name}` is {'missing' if name not in found else list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if found.get(name) != shape
    ]


def join_faults(faults: Sequence[str]) -> str:
    """The faults in one phrase, those of all layers together. Of very many, the number of the others."""
    phrases = join_layers(faults)
    more = f"; and {len(phrases) - _MAX_LISTED} more" if len(phrases) > _MAX_LISTED else ""
    return "; ".join(phrases[:_MAX_LISTED]) + more


def join_layers(phrases: Iterable[str]) -> list[str]:
    """Join the phrases that differ only in the first number of a name, such as `layers.{0-2,5}.attention.wq.bias`."""
    numbers: dict[str, list[int]] = {}
    for phrase in phrases:
        match = _NUMBER.search(phrase)
        pattern = phrase if match is None else f"{phrase[: match.start()]}\0{phrase[match.end() :]}"
        numbers.setdefault(pattern, []).extend([] if match is None else [int(match.group())])
    return [pattern.replace("\0", _as_ranges(found)) for pattern, found in numbers.items()]


def _as_ranges(numbers: Sequence[int]) -> str:
    """Numbers as text: 3, or {0-2,5}."""
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    return texts[0] if len(texts) == 1 and "-" not in texts[0] else f"{{{','.join(texts)}}}"


def no_name(_name: str) -> bool:
    """A predicate that is false for every name."""
    return False


def beyond_layers(num_layers: int) -> NamePredicate:
    """Predicate for parameters that an encoder of the first `num_layers` layers lacks, including norm and head."""

    def is_beyond(name: str) -> bool:
        if name in ("norm.weight", "output.weight"):
            return True
        parts = name.split(".")
        return parts[0] == "layers" and int(parts[1]) >= num_layers

    return is_beyond


def rotary_heads(name: str, config: BackboneConfig) -> int | None:
    """Number of heads along dimension 0 of the parameter `name`, if rotary positions rotate them; None otherwise.

    The parameters are weights and biases of wq and wk, and the norms of their outputs.
    """
    heads = {
        "wq": config.num_heads,
        "wk": config.num_kv_heads,
        "q_norm": config.num_heads,
        "k_norm": config.num_kv_heads,
    }
    match = _ROTATED.search(name)
    if match is None:
        return None
    return 1 if match.group(1).endswith("norm") and config.qk_norm == "head" else heads[match.group(1)]


def permute_rotary(weight: Tensor, num_heads: int, *, to: RotaryPairs) -> Tensor:
    """Reorder the rows of a query or key projection, head by head, for the other pairing of rotary dimensions.

    weight: [num_heads * head_dim, in], or a vector [num_heads * head_dim].
    num_heads: number of heads among the rows.
    to: "half" pairs (i, i + head_dim / 2), "interleaved" pairs (2i, 2i + 1). The two directions are exact inverses.

    Raises ValueError if the rows are not num_heads heads of an even size. Source: the converters of Llama weights to
    Hugging Face and to GGUF.
    """
    rows = weight.shape[0]
    if rows % (2 * num_heads):
        raise ValueError(f"{rows} rows are not {num_heads} heads of an even head_dim")
    pairs = rows // num_heads // 2
    split = (num_heads, pairs, 2) if to == "half" else (num_heads, 2, pairs)
    return weight.reshape(*split, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def rows_of_heads(
    read: Callable[[slice], Tensor],
    rows: slice,
    num_rows: int,
    num_heads: int,
    reorder: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Rows of a projection whose heads the file stores in another order. Reads whole heads, and no others.

    read: reads a slice of the file's rows.
    rows: the wanted rows.
    num_rows: number of rows of the projection.
    num_heads: number of heads among them.
    reorder: reorders the rows of a number of heads, such as `permute_rotary`.
    """
    first, last, _ = rows.indices(num_rows)
    head_dim = num_rows // num_heads
    first_head, last_head = first // head_dim, -(-last // head_dim)
    before = first_head * head_dim
    heads = reorder(read(slice(before, last_head * head_dim)), last_head - first_head)
    return heads[first - before : last - before]


def spread_rotary(weight: Tensor, num_heads: int, rotary_dim: int) -> Tensor:
    """Reorder the rows of a partly rotated projection, head by head, so that pairs are (i, i + head_dim / 2).

    In the files, the first `rotary_dim` rows of a head rotate as pairs (i, i + rotary_dim / 2). The result has them
    among the first rows of the two halves of the head. Arguments as in `permute_rotary`.
    """
    heads = weight.unflatten(0, (num_heads, -1))
    pairs, still = rotary_dim // 2, (heads.shape[1] - rotary_dim) // 2
    first, second, *rest = heads.split([pairs, pairs, still, still], dim=1)
    return torch.cat([first, rest[0], second, rest[1]], dim=1).reshape(weight.shape)

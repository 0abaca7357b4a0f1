"""Internal names and shapes of a backbone's parameters, and the exact permutation between the two rotary layouts.

Every linear weight is [out, in] without bias. w1 is the gate projection, w3 the up and w2 the down projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from torch import Tensor

from arc_ds.model.backbone_config import BackboneConfig

Shape = tuple[int, ...]
RotaryPairs = Literal["half", "interleaved"]
NamePredicate = Callable[[str], bool]
_MAX_LISTED = 8


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
    """The first faults in one phrase, and the number of the others."""
    more = f"; and {len(faults) - _MAX_LISTED} more" if len(faults) > _MAX_LISTED else ""
    return "; ".join(faults[:_MAX_LISTED]) + more


def no_name(name: str) -> bool:
    """A predicate that is false for every name."""
    del name
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
    """Number of heads in the parameter `name` that rotary positions rotate; None if it is not rotated."""
    if name.endswith("attention.wq.weight"):
        return config.num_heads
    if name.endswith("attention.wk.weight"):
        return config.num_kv_heads
    return None


def permute_rotary(weight: Tensor, num_heads: int, *, to: RotaryPairs) -> Tensor:
    """Reorder the rows of a query or key projection, head by head, for the other pairing of rotary dimensions.

    weight: [num_heads * head_dim, in].
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


def half_split_rows(read: Callable[[slice], Tensor], rows: slice, num_rows: int, num_heads: int) -> Tensor:
    """Rows, in half-split order, of a projection whose file pairs (2i, 2i + 1). Reads whole heads, and no others.

    read: reads a slice of the file's rows.
    rows: the wanted rows.
    num_rows: number of rows of the projection.
    num_heads: number of heads among them.
    """
    first, last, _ = rows.indices(num_rows)
    head_dim = num_rows // num_heads
    first_head, last_head = first // head_dim, -(-last // head_dim)
    before = first_head * head_dim
    heads = permute_rotary(read(slice(before, last_head * head_dim)), last_head - first_head, to="half")
    return heads[first - before : last - before]

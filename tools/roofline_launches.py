"""The launches of one operator on a GPU, with the bytes and the matrix products of each, from shapes alone.

A launch reads every distinct input once and writes every output once. Only the elements that it touches count: those of
an expanded tensor once, and of a table only the selected rows. Views and allocations launch nothing.
One operator of aten is one launch, unless it is known to be several (below); each operator of `arc_kernels` has an
entry in `OPERATORS`, next to which `tests/unit/tools/test_roofline.py` counts the launches of the real one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from arc_kernels.cross_entropy.kernels import VOCAB_ALIGNMENT, chunk_rows
from arc_kernels.norm import kernels as norm_kernels
from arc_kernels.pooling.kernels import WEIGHT_PROGRAMS

NUM_PROCESSORS = 132  # of an H100 or H200: the norms' backward writes partial sums for each

Arguments = Mapping[str, Any]
"""The arguments of a call by the names of the operator's schema."""


class Launch(NamedTuple):
    """One launch.

    kernel: name of the operator, and of the kernel if the operator launches several.
    bytes: read and written.
    flops: of matrix products; a product of [m, k] and [k, n] has 2mkn.
    """

    kernel: str
    bytes: int
    flops: int = 0


def launches_of(operator: OpOverload, args: tuple[Any, ...], kwargs: Arguments, result: Any) -> list[Launch]:
    """The launches of one call.

    operator: of aten or arc_kernels.
    args, kwargs, result: of the call; their tensors may be on "meta".

    ValueError if the call's work does not follow from its sizes (attention over segments of different lengths).
    """
    arguments = _by_name(operator, args, kwargs)
    outputs = _tensors(result)
    name = _name(operator)
    if operator.namespace == "arc_kernels":
        launches = OPERATORS[name].launches(arguments, outputs)
    elif is_metadata(operator, arguments, outputs):
        return []
    elif name in _SEVERAL:
        launches = _SEVERAL[name](arguments, outputs)
    elif name in _LOOKUPS:
        launches = [Launch(name, _lookup_bytes(arguments[_LOOKUPS[name]], arguments, outputs))]
    elif name.rstrip("_") in _SCATTERS:
        launches = _scatter(name, arguments, outputs)
    else:
        # torch's table lacks the products in place.
        count_flops = flop_registry.get(getattr(torch.ops.aten, name.rstrip("_"), None))
        flops = count_flops(*args, **kwargs, out_val=result) if count_flops else 0
        launches = [Launch(name, _plain_bytes(operator, arguments, outputs), flops)]
    return [launch for launch in launches if launch.bytes]


def is_metadata(operator: OpOverload, arguments: Arguments, outputs: list[Tensor]) -> bool:
    """Whether a call of aten launches nothing: an allocation, or outputs that are views of inputs, with no write."""
    if _name(operator) in _ALLOCATIONS:
        return True
    inputs = {_storage(x) for x in _tensors(arguments)}
    return not _written(operator, arguments) and all(_storage(x) in inputs for x in outputs)


def extent(*tensors: Tensor | None) -> int:
    """Bytes of the tensors' distinct elements, those of equal regions counted once; None counts nothing."""
    regions = {_region(x): x for x in tensors if x is not None}
    return sum(_distinct_elements(x) * x.element_size() for x in regions.values())


def _distinct_elements(x: Tensor) -> int:
    if x.numel() == 0:
        return 0
    return math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride != 0)


def _region(x: Tensor) -> tuple[Any, ...]:
    return _storage(x), x.storage_offset(), tuple(x.shape), x.stride()


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _name(operator: OpOverload) -> str:
    return operator._schema.name.partition("::")[2]


def _by_name(operator: OpOverload, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
    schema = operator._schema.arguments
    given = dict(zip((argument.name for argument in schema), args, strict=False)) | dict(kwargs)
    return {argument.name: argument.default_value for argument in schema} | given


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


# ---- aten

_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_WRITE_ONLY = {"copy_", "fill_", "zero_", "normal_", "uniform_"}
"""These do not read the tensor that they write."""
_LOOKUPS = {"index": "self", "index_select": "self", "gather": "self", "embedding": "weight"}
"""Rows or elements of a tensor by index, and the argument that is that tensor."""


def _written(operator: OpOverload, arguments: Arguments) -> list[Tensor]:
    """The arguments that the operator writes."""
    schema = operator._schema.arguments
    return _tensors([arguments[a.name] for a in schema if a.alias_info is not None and a.alias_info.is_write])


def _plain_bytes(operator: OpOverload, arguments: Arguments, outputs: list[Tensor]) -> int:
    """Every input read once, every written argument and every new output written once."""
    written = _written(operator, arguments)
    unread = {_region(x) for x in written} if _name(operator) in _WRITE_ONLY else set()
    unread |= {_region(x) for a in operator._schema.arguments if a.is_out for x in _tensors(arguments[a.name])}
    read = [x for x in _tensors(arguments) if _region(x) not in unread]
    return extent(*read) + extent(*written, *outputs)


def _lookup_bytes(table: Tensor, a: Arguments, outputs: list[Tensor]) -> int:
    """Bytes of the selected rows (at most the whole table), the indices and the output."""
    indices = _tensors([a.get(key) for key in ("index", "indices")])
    return min(extent(*outputs), extent(table)) + extent(*indices) + extent(*outputs)


def _index_put_bytes(a: Arguments) -> int:
    target, indices = a["self"], [index for index in a["indices"] if index is not None]
    whole_dims = [size for size, index in zip_longest(target.shape, a["indices"]) if index is None]
    touched = math.prod((*torch.broadcast_shapes(*(index.shape for index in indices)), *whole_dims))
    return extent(a["values"], *indices) + touched * target.element_size() * (2 if a["accumulate"] else 1)


def _index_copy_bytes(a: Arguments) -> int:
    return extent(a["index"], a["source"]) + a["source"].numel() * a["self"].element_size()


def _index_add_bytes(a: Arguments) -> int:
    return extent(a["index"], a["source"]) + 2 * a["source"].numel() * a["self"].element_size()


def _scatter_bytes(a: Arguments) -> int:
    return extent(*_tensors([a["index"], a.get("src")])) + a["index"].numel() * a["self"].element_size()


def _scatter_add_bytes(a: Arguments) -> int:
    return _scatter_bytes(a) + a["index"].numel() * a["self"].element_size()


_SCATTERS: Mapping[str, Callable[[Arguments], int]] = {
    "index_put": _index_put_bytes,
    "_index_put_impl": _index_put_bytes,
    "index_copy": _index_copy_bytes,
    "index_add": _index_add_bytes,
    "scatter": _scatter_bytes,
    "scatter_add": _scatter_add_bytes,
}
"""Writes by index into a tensor: bytes of the values, the indices and the elements touched (read too if added to)."""


def _scatter(name: str, a: Arguments, outputs: list[Tensor]) -> list[Launch]:
    """In place one launch; out of place the target is cloned first.

    An accumulating `index_put` is the gradient of a lookup: autograd adds into new zeros in place, and out of place
    only under a dispatch mode, such as the one that counts.
    """
    scatter = Launch(name, _SCATTERS[name.rstrip("_")](a))
    if name.endswith("_") or a.get("accumulate"):
        return [scatter]
    return [Launch(f"{name}: clone", extent(a["self"]) + extent(*outputs)), scatter]


def _into_zeros(name: str) -> Callable[[Arguments, list[Tensor]], list[Launch]]:
    """A gradient written or added into an output of zeros."""

    def launches(a: Arguments, outputs: list[Tensor]) -> list[Launch]:
        touched = min(extent(a["grad_output"]), extent(*outputs))
        return [Launch(f"{name}: zeros", extent(*outputs)), Launch(name, extent(*_tensors(a)) + touched)]

    return launches


_SEVERAL = {name: _into_zeros(name) for name in ("embedding_dense_backward", "slice_backward", "select_backward")}


# ---- arc_kernels


class Operator(NamedTuple):
    """An operator of `arc_kernels`: the folder that it stands in, and its launches by arguments and outputs."""

    folder: str
    launches: Callable[[Arguments, list[Tensor]], list[Launch]]


def visible_pairs(a: Arguments) -> int:
    """How many pairs of query and key attend, in an attention over segments of one length.

    ValueError if lengths differ or limits are given: neither follows from sizes.
    """
    num_segments, m, n = a["cu_seqlens_q"].numel() - 1, a["max_seqlen_q"], a["max_seqlen_k"]
    rows, expected = (a["q"].shape[0], a["k"].shape[0]), (num_segments * m, num_segments * n)
    if rows != expected or a["k_limits"] is not None:
        raise ValueError(
            f"attention has {rows} rows of queries and keys in {num_segments} segments of at most {m} and {n}, "
            f"k_limits {'given' if a['k_limits'] is not None else 'absent'}; expected {expected} rows and no limits: "
            "count batches of samples of one length"
        )
    if not a["causal"]:
        return num_segments * m * n
    return num_segments * sum(min(n - i, a["window"] or n) for i in range(m))


def _product_flops(a: Arguments) -> int:
    """One product over all visible pairs: 2 N H operations a pair."""
    return 2 * visible_pairs(a) * a["q"].shape[1] * a["q"].shape[2]


def _attention_forward(a: Arguments, outputs: list[Tensor]) -> list[Launch]:
    """Two products: scores, and values weighed by them."""
    return [Launch("attention_forward", extent(*_tensors(a)) + extent(*outputs), 2 * _product_flops(a))]


def _attention_backward(a: Arguments, outputs: list[Tensor]) -> list[Launch]:
    """delta; dq with three products; dk and dv with four, since both sides make the scores and dP."""
    product, delta_bytes = _product_flops(a), a["lse"].numel() * 4
    shared = extent(a["q"], a["k"], a["v"], a["do"], a["lse"], a["cu_seqlens_q"], a["cu_seqlens_k"]) + delta_bytes
    launches = [Launch("attention_backward: delta", extent(a["o"], a["do"]) + delta_bytes)]
    if a["wants_q"]:
        moved = shared + extent(a["cos_q"], a["sin_q"], outputs[0])
        launches.append(Launch("attention_backward: dq", moved, 3 * product))
    if a["wants_kv"]:
        moved = shared + extent(a["cos_k"], a["sin_k"], *outputs[-2:])
        launches.append(Launch("attention_backward: dkv", moved, 4 * product))
    return launches


def _linear_cross_entropy(a: Arguments, outputs: list[Tensor]) -> list[Launch]:
    """For each chunk of rows: logits, their softmax in place, and the rows' gradient if wanted."""
    h, weight, labels = a["h_LD"], a["weight_VD"], a["labels_L"]
    (num_rows, width), vocab_size = h.shape, weight.shape[0]
    stride = math.ceil(vocab_size / VOCAB_ALIGNMENT) * VOCAB_ALIGNMENT
    chunk = chunk_rows(num_rows, row_bytes=stride * h.element_size())
    launches = []
    for start in range(0, num_rows, chunk):
        rows = min(chunk, num_rows - start)
        hidden, logits = rows * width * h.element_size(), rows * vocab_size * h.element_size()
        per_row = rows * (labels.element_size() + outputs[0].element_size())
        flops = 2 * rows * width * vocab_size
        launches.append(Launch("linear_cross_entropy: logits", hidden + extent(weight) + logits, flops))
        passes = 2 if a["wants_grad"] else 1
        launches.append(Launch("linear_cross_entropy: softmax", passes * logits + per_row))
        if a["wants_grad"]:
            launches.append(Launch("linear_cross_entropy: gradient", logits + extent(weight) + hidden, flops))
    return launches


def _scale_rows(a: Arguments, outputs: list[Tensor]) -> list[Launch]:
    """The scales come expanded from the gradient of a sum: the operator makes them contiguous first."""
    scale = a["scale_L"]
    copied = scale.numel() * scale.element_size()
    copies = [] if scale.is_contiguous() else [Launch("scale_rows: contiguous", extent(scale) + copied)]
    return [*copies, Launch("scale_rows", extent(a["x_LD"], *outputs) + copied)]


def _norm_backward(a: Arguments, outputs: list[Tensor]) -> list[Launch]:
    """The rows' gradient; the weight's from partial sums, one for each program that the processors hold."""
    x = a["x_TD"]
    config = norm_kernels.choose(x.shape[1])
    num_blocks = math.ceil(x.shape[0] / config.block_rows)
    partials = min(num_blocks, config.partial_sums * NUM_PROCESSORS)
    return _with_weight_sum("norm_backward", a, outputs, partials)


def _pool_norm_backward(a: Arguments, outputs: list[Tensor]) -> list[Launch]:
    return _with_weight_sum("pool_norm_backward", a, outputs, min(WEIGHT_PROGRAMS, a["pooled_GD"].shape[0]))


def _with_weight_sum(name: str, a: Arguments, outputs: list[Tensor], num_partials: int) -> list[Launch]:
    """One kernel, and if the weight's gradient is wanted torch's sum of the partial sums and its cast."""
    dx, dweight = outputs
    moved = extent(*_tensors(a), dx)
    if a["weight_D"] is None or not a["wants_weight"]:
        return [Launch(name, moved)]
    partials, total = num_partials * dx.shape[1] * 4, dweight.numel() * 4
    launches = [Launch(name, moved + partials), Launch(f"{name}: sum", partials + total)]
    if dweight.dtype != torch.float32:
        launches.append(Launch(f"{name}: cast", total + extent(dweight)))
    return launches


def _splice(a: Arguments, outputs: list[Tensor]) -> list[Launch]:
    """Selected rows of the table (at most the whole table), and the given rows, written to the output."""
    table, ids = a["table_VD"], a["ids_N"]
    rows = min(ids.numel() * table.shape[1] * table.element_size(), extent(table))
    return [Launch("splice", rows + extent(ids, a["text_rows_N"], a["given_ZD"], a["given_rows_Z"], *outputs))]


def _splice_given_gradient(a: Arguments, outputs: list[Tensor]) -> list[Launch]:
    rows = outputs[0].numel() * a["grad_RD"].element_size()
    return [Launch("splice_given_gradient", rows + extent(a["given_rows_Z"], *outputs))]


def _splice_table_gradient(a: Arguments, outputs: list[Tensor]) -> list[Launch]:
    """Zeros for all tokens; ids sorted, with the end of each run and the rows in that order; the sums of the runs."""
    name, grad, indices = "splice_table_gradient", a["grad_RD"], extent(a["ids_N"])
    num_values = a["ids_N"].numel() * grad.shape[1]
    return [
        Launch(f"{name}: zeros", extent(*outputs)),
        Launch(f"{name}: sort", 3 * indices),
        Launch(f"{name}: searchsorted", 2 * indices),
        Launch(f"{name}: index", 3 * indices),
        Launch(f"{name}: sums", 3 * indices + num_values * (grad.element_size() + outputs[0].element_size())),
    ]


def _one(name: str) -> Callable[[Arguments, list[Tensor]], list[Launch]]:
    """One kernel that reads all inputs and writes all outputs."""
    return lambda a, outputs: [Launch(name, extent(*_tensors(a)) + extent(*outputs))]


OPERATORS: Mapping[str, Operator] = {
    "attention_forward": Operator("attention", _attention_forward),
    "attention_backward": Operator("attention", _attention_backward),
    "linear_cross_entropy": Operator("cross_entropy", _linear_cross_entropy),
    "scale_rows": Operator("cross_entropy", _scale_rows),
    "norm_forward": Operator("norm", _one("norm_forward")),
    "norm_backward": Operator("norm", _norm_backward),
    "group_pool": Operator("pooling", _one("group_pool")),
    "group_pool_backward": Operator("pooling", _one("group_pool_backward")),
    "pool_norm": Operator("pooling", _one("pool_norm")),
    "pool_norm_backward": Operator("pooling", _pool_norm_backward),
    "rotary": Operator("rotary", _one("rotary")),
    "splice": Operator("splice", _splice),
    "splice_given_gradient": Operator("splice", _splice_given_gradient),
    "splice_table_gradient": Operator("splice", _splice_table_gradient),
    "swiglu_forward": Operator("swiglu", _one("swiglu_forward")),
    "swiglu_backward": Operator("swiglu", _one("swiglu_backward")),
}

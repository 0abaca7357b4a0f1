"""Benchmark cases: each kernel at the widths of Llama 3.2 3B and Llama 3.1 8B, with baselines and floors.

Shape letters: T rows, G groups, N heads, H head size, D width, F feed-forward width, V vocabulary, L labelled rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import arc_kernels as ak

Function = Callable[..., Any]
BYTES = 2  # per element: all cases are bfloat16
EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The size of the cases."""

    rows: int
    labels: int
    vocab_size: int
    lengths: tuple[tuple[int, ...], ...]
    """Lengths of attention's segments, one tuple per batch."""

    window: int
    """Of attention with a sliding window, over the last batch."""


# 16 sequences of 512, as in the paper's step; then ragged lengths from 256 to 8192, which tiles rarely divide.
FULL = Scale(
    rows=8192,
    labels=4096,
    vocab_size=128256,
    lengths=((512,) * 16, (8192, 256, 5120, 1111, 2048, 3333, 640, 4096)),
    window=1024,
)
QUICK = Scale(rows=4096, labels=1024, vocab_size=128256, lengths=((2048, 256, 700, 1500),), window=512)
TINY = Scale(rows=8, labels=8, vocab_size=500, lengths=((7, 12),), window=4)


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The minimum memory traffic in bytes (each input read once, each output written once) and the minimum FLOPs.

    FLOPs are those of the algorithm as the baselines count them, without recomputation. They are 0 for memory-bound
    kernels.
    """

    forward_bytes: int = 0
    backward_bytes: int = 0
    forward_flops: int = 0
    backward_flops: int = 0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel at one shape. All functions take the inputs by keyword and return a tensor or a tuple of them."""

    kernel: str
    shape: str
    function: Function
    """The public function. It runs the kernel under `use("triton")` and the oracle under `use("reference")`."""

    inputs: Callable[[torch.device], dict[str, Tensor]]
    wants_grad: tuple[str, ...]
    floor: Floor
    eager: Function | None = None
    """Plain torch, if it differs from the reference. torch.compile compiles it too."""

    baselines: Mapping[str, Function] = field(default_factory=dict)
    """They import what they need when they are called: a library that cannot be imported loses only its own rows."""

    is_compiled: bool = True
    """Whether torch.compile of the plain torch function is measured too."""

    compiled_baselines: frozenset[str] = frozenset()
    """The baselines that torch.compile compiles, which takes seconds."""


def cases(scale: Scale) -> Iterator[Case]:
    """All cases except attention's (see `gpu_attention`)."""
    for width in (3072, 4096):
        yield _norm("rms_norm", scale.rows, width)
        yield _norm("add_rms_norm", scale.rows, width)
    yield _norm("rms_norm", 32 * scale.rows, 128)  # the heads of queries, each normed (qk-norm)
    yield _norm("layer_norm", scale.rows, 4096)
    yield _norm("add_layer_norm", scale.rows, 4096)
    for num_heads in (24, 32):
        yield _rotary(scale.rows, num_heads)
    for width in (8192, 14336):
        yield _swiglu(scale.rows, width)
    for factor in (4, 8):
        yield _pooling("pool_norm", scale.rows, 3072, factor)
    yield _pooling("group_pool", scale.rows, 3072, 8)
    yield _splice(scale, 4096, trains_table=False)
    yield _splice(scale, 3072, trains_table=True)
    for width in (3072, 4096):
        yield _cross_entropy(scale, width)


def normal(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Standard normal bfloat16 tensors, identical in every run on a device."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device).bfloat16() for shape in shapes]


def normals(**shapes: tuple[int, ...]) -> Callable[[torch.device], dict[str, Tensor]]:
    """The inputs of a case: `normal` tensors of these shapes."""
    return lambda device: dict(zip(shapes, normal(device, *shapes.values()), strict=True))


def angles(positions_T: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """(cos, sin) [T, H / 2] of rotary positions, as in Llama 3."""
    frequencies = 500000.0 ** (torch.arange(head_dim // 2, device=positions_T.device) / -(head_dim // 2))
    angles_TF = positions_T[:, None] * frequencies
    return angles_TF.cos(), angles_TF.sin()


def _norm(kernel: str, rows: int, width: int) -> Case:
    adds = kernel.startswith("add_")
    shapes: dict[str, tuple[int, ...]] = {"x_TD": (rows, width)}
    if adds:
        shapes["residual_TD"] = (rows, width)
    if kernel.endswith("rms_norm"):
        shapes["weight_D"] = (width,)
    tensor_bytes = rows * width * BYTES
    baselines = {"rms_norm": _rms_norm_baselines, "layer_norm": _layer_norm_baselines}.get(kernel, lambda _: {})
    return Case(
        kernel=kernel,
        shape=f"T={rows} D={width}",
        function=partial(getattr(ak, kernel), eps=EPS),
        inputs=normals(**shapes),
        wants_grad=tuple(shapes),
        floor=Floor(forward_bytes=(4 if adds else 2) * tensor_bytes, backward_bytes=(4 if adds else 3) * tensor_bytes),
        baselines=baselines(width),
    )


def _rms_norm_baselines(width: int) -> dict[str, Function]:
    def liger(x_TD: Tensor, weight_D: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_rms_norm

        return liger_rms_norm(x_TD, weight_D, EPS, in_place=False)

    def quack(x_TD: Tensor, weight_D: Tensor) -> Tensor:
        from quack import rmsnorm

        return rmsnorm(x_TD, weight_D, eps=EPS)

    baselines: dict[str, Function] = {"F.rms_norm": lambda x_TD, weight_D: F.rms_norm(x_TD, (width,), weight_D, EPS)}
    baselines |= {"Liger": liger} if find_spec("liger_kernel") else {}
    return baselines | ({"quack": quack} if find_spec("quack") else {})


def _layer_norm_baselines(width: int) -> dict[str, Function]:
    return {"F.layer_norm": lambda x_TD: F.layer_norm(x_TD, (width,), eps=EPS)}


def _rotary(rows: int, num_heads: int, head_dim: int = 128) -> Case:
    def inputs(device: torch.device) -> dict[str, Tensor]:
        (x,) = normal(device, (rows, num_heads, head_dim))
        cos, sin = angles(torch.arange(rows, device=device), head_dim)
        return {"x_TNH": x, "cos_TF": cos, "sin_TF": sin}

    bytes_moved = 2 * rows * num_heads * head_dim * BYTES + rows * head_dim * 4  # cos and sin are float32
    return Case(
        kernel="rotary",
        shape=f"T={rows} N={num_heads} H={head_dim}",
        function=ak.rotary,
        inputs=inputs,
        wants_grad=("x_TNH",),
        floor=Floor(forward_bytes=bytes_moved, backward_bytes=bytes_moved),
    )


def _swiglu(rows: int, width: int) -> Case:
    def liger(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_swiglu

        return liger_swiglu(gate_TF, up_TF)  # backward writes the gradients over gate and up

    return Case(
        kernel="swiglu",
        shape=f"T={rows} F={width}",
        function=ak.swiglu,
        inputs=normals(gate_TF=(rows, width), up_TF=(rows, width)),
        wants_grad=("gate_TF", "up_TF"),
        floor=Floor(forward_bytes=3 * rows * width * BYTES, backward_bytes=5 * rows * width * BYTES),
        baselines={"Liger": liger} if find_spec("liger_kernel") else {},
    )


def _pooling(kernel: str, rows: int, width: int, factor: int) -> Case:
    num_groups = rows // factor
    norms = kernel == "pool_norm"

    def inputs(device: torch.device) -> dict[str, Tensor]:
        x, weight = normal(device, (rows, width), (width,))
        tensors = {"x_TD": x, "group_cu": _group_cu(rows, num_groups, device)}
        return tensors | ({"weight_D": weight} if norms else {})

    tensor_bytes = (rows + num_groups) * width * BYTES
    return Case(
        kernel=kernel,
        shape=f"T={rows} G={num_groups} D={width} mean",
        function=partial(getattr(ak, kernel), kind="mean", num_groups=num_groups, **({"eps": EPS} if norms else {})),
        inputs=inputs,
        wants_grad=("x_TD", "weight_D") if norms else ("x_TD",),
        floor=Floor(
            forward_bytes=(2 if norms else 1) * tensor_bytes, backward_bytes=(3 if norms else 1) * tensor_bytes
        ),
    )


def _group_cu(rows: int, num_groups: int, device: torch.device) -> Tensor:
    """Boundaries of groups with factor - 1, factor and factor + 1 rows in turn: ragged, as at the ends of contexts."""
    factor = rows // num_groups
    sizes = torch.full((num_groups,), factor, dtype=torch.int32)
    pairs = num_groups // 3
    sizes[0 : 3 * pairs : 3] -= 1
    sizes[2 : 3 * pairs : 3] += 1
    return F.pad(sizes.cumsum(0, dtype=torch.int32), (1, 0)).to(device)


def _splice(scale: Scale, width: int, *, trains_table: bool) -> Case:
    num_given = scale.rows // 8
    num_text = scale.rows - num_given

    def inputs(device: torch.device) -> dict[str, Tensor]:
        table, given = normal(device, (scale.vocab_size, width), (num_given, width))
        generator = torch.Generator(device).manual_seed(1)
        order = torch.randperm(scale.rows, generator=generator, device=device)
        ids = torch.randint(scale.vocab_size, (num_text,), generator=generator, device=device)
        text_rows, given_rows = order[:num_text].sort().values, order[num_text:].sort().values
        return {
            "table_VD": table,
            "ids_N": ids,
            "text_rows_N": text_rows,
            "given_ZD": given,
            "given_rows_Z": given_rows,
        }

    given_bytes = 2 * num_given * width * BYTES
    table_bytes = (num_text + scale.vocab_size) * width * BYTES  # a dense gradient is written, including zeros
    return Case(
        kernel="splice",
        shape=f"R={scale.rows} Z={num_given} D={width} V={scale.vocab_size} {'trained' if trains_table else 'frozen'}",
        function=ak.splice,
        inputs=inputs,
        wants_grad=("table_VD", "given_ZD") if trains_table else ("given_ZD",),
        floor=Floor(
            forward_bytes=2 * scale.rows * width * BYTES,
            backward_bytes=given_bytes + (table_bytes if trains_table else 0),
        ),
    )


def _cross_entropy(scale: Scale, width: int) -> Case:
    def inputs(device: torch.device) -> dict[str, Tensor]:
        h, weight = normal(device, (scale.labels, width), (scale.vocab_size, width))
        generator = torch.Generator(device).manual_seed(1)
        labels = torch.randint(scale.vocab_size, (scale.labels,), generator=generator, device=device)
        return {"h_LD": h, "weight_VD": weight / width**0.5, "labels_L": labels}

    product = 2 * scale.labels * width * scale.vocab_size
    return Case(
        kernel="linear_cross_entropy",
        shape=f"L={scale.labels} D={width} V={scale.vocab_size}",
        function=ak.linear_cross_entropy,
        eager=_whole_logits,
        inputs=inputs,
        wants_grad=("h_LD",),
        # We compute the gradient of h in forward, others in backward. Only the sum of both is comparable.
        floor=Floor(forward_flops=product, backward_flops=product),
        baselines=dict(_cross_entropy_baselines()),
    )


def _whole_logits(h_LD: Tensor, weight_VD: Tensor, labels_L: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h_LD, weight_VD).float(), labels_L, reduction="none")


def _cross_entropy_baselines() -> Iterator[tuple[str, Function]]:
    def chunked(**inputs: Tensor) -> Tensor:
        with ak.use("reference"):
            return ak.linear_cross_entropy(**inputs)

    yield "reference, chunked", chunked
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13
        # Keep the graph: backward alone is timed.
        options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)

        def torch_chunked(h_LD: Tensor, weight_VD: Tensor, labels_L: Tensor) -> Tensor:
            return F.linear_cross_entropy(h_LD, weight_VD, labels_L, reduction="sum", options=options)

        yield "F.linear_cross_entropy", torch_chunked
    if find_spec("liger_kernel"):

        def liger(h_LD: Tensor, weight_VD: Tensor, labels_L: Tensor) -> Tensor:
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            return liger_fused_linear_cross_entropy(h_LD, weight_VD, labels_L, reduction="sum")

        yield "Liger", liger

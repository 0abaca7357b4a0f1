"""The cases of `dry_launch.py`: every public function at every configuration, on few rows.

The cases have three sources: the benchmark's cases (the widths of the paper's models) in each dtype, the kernels'
`compile_specs()` (each spec converted back to a call that launches it), and `_variants`, which add arguments and shapes
that neither source has.

Shape letters: T rows, U keys, N heads, K kv heads, H head size, D width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Any

import torch
from compile_offline import specs_of
from gpu_attention import attention_cases
from gpu_cases import EPS, TINY, Case, Function, cases
from torch import Tensor

import arc_kernels as ak
from arc_kernels.attention.configs import Chip, Kernel, choose

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MODES = ("full", "causal", "limits")
NORMS = ("none", "rms", "layer")
CHIP: Chip = "sm_90"
NUM_KV_HEADS = 8  # same as in the specs
LONG = 130  # keys; longer than any tile
WINDOW = 48
SHORT = (64, 16)
"""Lengths up to which attention uses smaller tiles."""


@dataclass(frozen=True, kw_only=True)
class DryCase:
    """One call of a public function."""

    kernel: str
    """The folder of `arc_kernels`."""

    name: str
    """Unique within the folder."""

    function: Function
    inputs: Callable[[], dict[str, Any]]
    """Create the tensors, by keyword. Their values do not matter, except for indices."""

    wants_grad: tuple[str, ...]


@cache
def cases_of(kernel: str) -> dict[str, DryCase]:
    """All cases of one folder of `arc_kernels`, by name, without duplicates."""
    by_name: dict[str, DryCase] = {}
    for case in (*_from_benchmark(kernel), *_from_specs(kernel), *_VARIANTS[kernel]()):
        by_name.setdefault(case.name, case)
    return by_name


_FOLDERS = {
    "add_layer_norm": "norm",
    "add_rms_norm": "norm",
    "attention_rotary": "attention",
    "group_pool": "pooling",
    "layer_norm": "norm",
    "linear_cross_entropy": "cross_entropy",
    "pool_norm": "pooling",
    "rms_norm": "norm",
}
"""The folder of each function in the benchmark's cases, if it has another name."""


def _from_benchmark(kernel: str) -> Iterator[DryCase]:
    for case, dtype in product((*cases(TINY), *attention_cases(TINY)), DTYPES):
        if _FOLDERS.get(case.kernel, case.kernel) == kernel:
            yield DryCase(
                kernel=kernel,
                name=f"{case.kernel} {dtype} {case.shape} (benchmark)",
                function=case.function,
                inputs=partial(_benchmark_inputs, case, DTYPES[dtype]),
                wants_grad=case.wants_grad,
            )


def _benchmark_inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs of a benchmark case in another dtype than bfloat16."""
    inputs = case.inputs(torch.device("cpu"))
    return {name: x.to(dtype) if x.dtype == torch.bfloat16 else x for name, x in inputs.items()}


def _from_specs(kernel: str) -> Iterator[DryCase]:
    """One call per spec. Several specs of one call (forward and backward) give equal cases."""
    specs = specs_of(kernel, CHIP).values()
    if kernel == "attention":
        yield from _attention_from_specs(specs)
        return
    for spec in specs:
        yield _FROM_SPEC[kernel](spec.constexprs, _dtype_of(spec))


def _dtype_of(spec: Any) -> str:
    """The dtype of the data. 16-bit kernels also have 32-bit statistics."""
    kinds = spec.signature.values()
    return next((dtype for dtype in ("bf16", "fp16") if f"*{dtype}" in kinds), "fp32")


def _zeros(dtype: str, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=DTYPES[dtype])


# Norms


def _norm_from_spec(constants: dict[str, Any], dtype: str) -> DryCase:
    return _norm(
        dtype,
        constants["D"],
        adds=constants.get("ADDS", False),
        layer_norm=constants.get("LAYER_NORM", False),
        trains_weight=constants.get("WEIGHT_GRAD", True),
    )


def _norm(dtype: str, width: int, *, adds: bool, layer_norm: bool, trains_weight: bool = True) -> DryCase:
    function = f"{'add_' if adds else ''}{'layer' if layer_norm else 'rms'}_norm"

    def inputs() -> dict[str, Tensor]:
        tensors = {"x_TD": _zeros(dtype, 3, width)}
        tensors |= {"residual_TD": _zeros(dtype, 3, width)} if adds else {}
        return tensors | ({} if layer_norm else {"weight_D": _zeros(dtype, width)})

    trained = [name for name in inputs() if name != "weight_D" or trains_weight]
    return DryCase(
        kernel="norm",
        name=f"{function} {dtype} D={width}{'' if trains_weight or layer_norm else ' frozen weight'}",
        function=partial(getattr(ak, function), eps=EPS),
        inputs=inputs,
        wants_grad=tuple(trained),
    )


def _norm_variants() -> Iterator[DryCase]:
    for dtype, width, (adds, layer_norm) in product(DTYPES, (1, 100), product((False, True), repeat=2)):
        yield _norm(dtype, width, adds=adds, layer_norm=layer_norm)
    plain = _norm("bf16", 576, adds=False, layer_norm=False)
    yield _changed(plain, "rows apart", x_TD=lambda: _zeros("bf16", 3, 600)[:, :576])
    yield _changed(plain, "weight fp32", weight_D=lambda: _zeros("fp32", 576))
    yield replace(plain, name=f"{plain.name} without gradients", wants_grad=())


# Pooling


def _pooling(dtype: str, width: int, kind: str, norm: str, *, trains_weight: bool = True) -> DryCase:
    """norm: "none" for `group_pool`, "rms" or "layer" for `pool_norm`."""
    function: Function = partial(ak.group_pool, kind=kind, num_groups=3)
    if norm != "none":
        function = partial(ak.pool_norm, kind=kind, num_groups=3, eps=EPS)
    if norm == "layer":
        function = partial(function, weight_D=None)

    def inputs() -> dict[str, Tensor]:
        group_cu = torch.tensor([0, 1, 4, 8], dtype=torch.int32)
        weight = {"weight_D": _zeros(dtype, width)} if norm == "rms" else {}
        return {"x_TD": _zeros(dtype, 8, width), "group_cu": group_cu, **weight}

    is_trained = norm == "rms" and trains_weight
    return DryCase(
        kernel="pooling",
        name=f"{kind} {norm} {dtype} D={width}{'' if trains_weight else ' frozen weight'}",
        function=function,
        inputs=inputs,
        wants_grad=("x_TD", "weight_D") if is_trained else ("x_TD",),
    )


def _pooling_variants() -> Iterator[DryCase]:
    for dtype, kind, norm in product(DTYPES, ak.POOL_KINDS, NORMS):
        yield _pooling(dtype, 100, kind, norm)
    for kind, norm in product(ak.POOL_KINDS, NORMS):
        yield _pooling("bf16", 1, kind, norm)
    for width in (100, 4096):
        yield _pooling("bf16", width, "mean", "rms", trains_weight=False)
    plain = _pooling("bf16", 576, "mean", "rms")
    yield _changed(plain, "weight fp32", weight_D=lambda: _zeros("fp32", 576))
    yield replace(plain, name=f"{plain.name} without gradients", wants_grad=())


# Rotary


def _rotary(dtype: str, num_heads: int, head_dim: int, *, angles: torch.dtype = torch.float32) -> DryCase:
    def inputs() -> dict[str, Tensor]:
        cos, sin = torch.zeros(2, 3, head_dim // 2, dtype=angles).unbind()
        return {"x_TNH": _zeros(dtype, 3, num_heads, head_dim), "cos_TF": cos, "sin_TF": sin}

    return DryCase(
        kernel="rotary",
        name=f"rotary {dtype} N={num_heads} H={head_dim}{'' if angles == torch.float32 else ' angles fp64'}",
        function=ak.rotary,
        inputs=inputs,
        wants_grad=("x_TNH",),
    )


def _rotary_variants() -> Iterator[DryCase]:
    for dtype, (num_heads, head_dim) in product(DTYPES, ((1, 2), (3, 96), (32, 512))):
        yield _rotary(dtype, num_heads, head_dim)
    yield _rotary("bf16", 8, 128, angles=torch.float64)
    plain = _rotary("bf16", 8, 128)
    yield _changed(plain, "slice of a projection", x_TNH=lambda: _zeros("bf16", 3, 12, 128)[:, :8])


# SwiGLU


def _swiglu(dtype: str, width: int) -> DryCase:
    return DryCase(
        kernel="swiglu",
        name=f"swiglu {dtype} F={width}",
        function=ak.swiglu,
        inputs=lambda: {"gate_TF": _zeros(dtype, 3, width), "up_TF": _zeros(dtype, 3, width)},
        wants_grad=("gate_TF", "up_TF"),
    )


def _swiglu_variants() -> Iterator[DryCase]:
    for dtype, width in product(DTYPES, (1, 100)):
        yield _swiglu(dtype, width)

    def halves() -> dict[str, Tensor]:
        gate, up = _zeros("bf16", 3, 2 * 8192).chunk(2, dim=1)
        return {"gate_TF": gate, "up_TF": up}

    yield replace(_swiglu("bf16", 8192), name="swiglu bf16 F=8192 halves of a projection", inputs=halves)


# Splice


def _splice(dtype: str, width: int) -> DryCase:
    """Four tokens from a table of 33, and two rows between them. (In the specs, V is not a multiple of 16.)"""

    def inputs() -> dict[str, Tensor]:
        return {
            "table_VD": _zeros(dtype, 33, width),
            "ids_N": torch.tensor([3, 0, 31, 3]),
            "text_rows_N": torch.tensor([0, 1, 4, 5]),
            "given_ZD": _zeros(dtype, 2, width),
            "given_rows_Z": torch.tensor([2, 3]),
        }

    return DryCase(
        kernel="splice",
        name=f"splice {dtype} D={width}",
        function=ak.splice,
        inputs=inputs,
        wants_grad=("table_VD", "given_ZD"),
    )


def _splice_variants() -> Iterator[DryCase]:
    for dtype, width in product(DTYPES, (1, 100)):
        yield _splice(dtype, width)
    plain = _splice("bf16", 576)
    frozen = replace(plain, name=f"{plain.name} frozen table", wants_grad=("given_ZD",))
    yield frozen
    yield _changed(plain, "given fp32", given_ZD=lambda: _zeros("fp32", 2, 576))
    yield _changed(plain, "table rows apart", table_VD=lambda: _zeros("bf16", 33, 600)[:, :576])
    yield _changed(
        plain, "table of one token", table_VD=lambda: _zeros("bf16", 1, 576), ids_N=lambda: torch.zeros(4).long()
    )
    text = _changed(
        plain, "text alone", given_ZD=lambda: None, given_rows_Z=lambda: None, text_rows_N=lambda: torch.arange(4)
    )
    yield replace(text, wants_grad=("table_VD",))
    yield replace(text, name=f"{text.name} without gradients", wants_grad=())


# Cross-entropy


def _cross_entropy_from_spec(constants: dict[str, Any], dtype: str) -> DryCase:
    """Reduce the vocabulary to one block, because the number of blocks is not a constant of the kernel."""
    trains = constants.get("WRITES_GRADIENT", True)
    return _cross_entropy(dtype, constants.get("BLOCK_V", 64), constants.get("BLOCK_D", 64), trains=trains)


def _cross_entropy(dtype: str, vocab_size: int, width: int, *, trains: bool = True) -> DryCase:
    def inputs() -> dict[str, Tensor]:
        return {
            "h_LD": _zeros(dtype, 3, width),
            "weight_VD": _zeros(dtype, vocab_size, width),
            "labels_L": torch.zeros(3, dtype=torch.int64),
        }

    return DryCase(
        kernel="cross_entropy",
        name=f"linear_cross_entropy {dtype} V={vocab_size} D={width}{'' if trains else ' without gradients'}",
        function=ak.linear_cross_entropy,
        inputs=inputs,
        wants_grad=("h_LD",) if trains else (),
    )


def _cross_entropy_variants() -> Iterator[DryCase]:
    # An odd vocabulary, whose rows of logits are padded to a multiple of 64; one with two blocks; one token.
    for dtype, vocab_size in product(DTYPES, (1, 101, 32000)):
        yield _cross_entropy(dtype, vocab_size, 100)
    yield _cross_entropy("bf16", 64, 1)


# Attention


def _attention_from_specs(specs: Iterable[Any]) -> Iterator[DryCase]:
    """Each head, mask and dtype of the specs with long segments, and each head and dtype with short ones."""
    heads = []
    for spec in specs:
        constants, dtype = spec.constexprs, _dtype_of(spec)
        heads.append((dtype, constants["H"]))
        if "TURNS" in constants:  # skip delta, which depends only on heads
            mode = "causal" if constants["CAUSAL"] else "limits" if constants["LIMITED"] else "full"
            window = None if "window" in constants else WINDOW
            turns = constants["TURNS"]
            yield _attention(dtype, constants["H"], constants["GROUP"], mode, turns=turns, window=window)
    for (dtype, head_dim), longest in product(dict.fromkeys(heads), SHORT):
        if _configs(dtype, head_dim, longest) != _configs(dtype, head_dim, LONG):
            yield _attention(dtype, head_dim, 4, "causal", longest=longest)


def _configs(dtype: str, head_dim: int, longest: int) -> list[Any]:
    kernels: tuple[Kernel, ...] = ("forward", "dq", "dkv")
    sizes = {"head_dim": head_dim, "num_rows": longest, "num_keys": longest}
    return [choose(kernel, chip=CHIP, dtype=DTYPES[dtype], **sizes) for kernel in kernels]


def _attention(
    dtype: str,
    head_dim: int,
    group: int,
    mode: str,
    *,
    turns: bool = False,
    window: int | None = None,
    longest: int = LONG,
    num_kv_heads: int = NUM_KV_HEADS,
) -> DryCase:
    """Two segments. The longer one has `longest` keys and, with the heads of a group, as many packed query rows."""
    queries = (max(1, longest // group), max(1, longest // group // 2))
    keys = (longest, longest // 2 + 1)

    def inputs() -> dict[str, Any]:
        tensors: dict[str, Any] = {
            "q_TNH": _zeros(dtype, sum(queries), num_kv_heads * group, head_dim),
            "k_UKH": _zeros(dtype, sum(keys), num_kv_heads, head_dim),
            "v_UKH": _zeros(dtype, sum(keys), num_kv_heads, head_dim),
            "cu_seqlens_q": _boundaries(queries),
            "cu_seqlens_k": _boundaries(keys),
        }
        if mode == "limits":
            tensors["k_limits_T"] = torch.ones(sum(queries), dtype=torch.int32)
        if turns:
            tensors |= {"rotary_q": _angles(sum(queries), head_dim), "rotary_k": _angles(sum(keys), head_dim)}
        return tensors

    shape = f"{dtype} H={head_dim} K={num_kv_heads} group={group} {mode} longest={longest}"
    return DryCase(
        kernel="attention",
        name=f"attention {shape}{' turned' if turns else ''}{f' window={window}' if window else ''}",
        function=partial(
            ak.attention_varlen,
            max_seqlen_q=max(queries),
            max_seqlen_k=max(keys),
            causal=mode == "causal",
            window=window,
        ),
        inputs=inputs,
        wants_grad=("q_TNH", "k_UKH", "v_UKH"),
    )


def _boundaries(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _angles(num_rows: int, head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    cos, sin = torch.zeros(2, num_rows, head_dim // 2, dtype=dtype).unbind()
    return cos, sin


def _attention_variants() -> Iterator[DryCase]:
    for mode, turns in product(MODES, (False, True)):
        yield _attention("fp16", 64, 2, mode, turns=turns)
    for dtype, mode in product(DTYPES, MODES):
        yield _attention(dtype, 17, 1, mode, longest=1, num_kv_heads=1)  # one query, one key
    for head_dim in (1, 33, 96):
        yield _attention("bf16", head_dim, 5, "causal")
    for dtype, mode in product(DTYPES, ("causal", "limits")):
        yield _attention(dtype, 64, 2, mode, window=1)
    plain, turned = _attention("bf16", 64, 4, "causal"), _attention("bf16", 64, 4, "causal", turns=True)
    for case in (plain, turned):
        yield replace(case, name=f"{case.name} gradient of q", wants_grad=("q_TNH",))
        yield replace(case, name=f"{case.name} gradients of k and v", wants_grad=("k_UKH", "v_UKH"))
        yield replace(case, name=f"{case.name} without gradients", wants_grad=())
    num_rows = {f"rotary_{side}": turned.inputs()[name].shape[0] for side, name in (("q", "q_TNH"), ("k", "k_UKH"))}
    for side in ("rotary_q", "rotary_k"):
        yield _changed(turned, f"without {side}", **{side: lambda: None})
    wide = {side: partial(_angles, rows, 64, torch.float64) for side, rows in num_rows.items()}
    yield _changed(turned, "angles fp64", **wide)
    yield _fused_attention()


def _fused_attention() -> DryCase:
    """q, k and v as slices of one projection, so their rows are not adjacent."""
    plain = _attention("bf16", 128, 1, "full")

    def inputs() -> dict[str, Any]:
        cu = plain.inputs()["cu_seqlens_k"]
        q, k, v = _zeros("bf16", int(cu[-1]), 3 * NUM_KV_HEADS, 128).split(NUM_KV_HEADS, dim=1)
        return {"q_TNH": q, "k_UKH": k, "v_UKH": v, "cu_seqlens_q": cu, "cu_seqlens_k": cu}

    function = partial(plain.function, max_seqlen_q=LONG)
    return replace(plain, name=f"{plain.name} slices of a projection", function=function, inputs=inputs)


def _changed(case: DryCase, words: str, **changes: Callable[[], Any]) -> DryCase:
    """The case with some inputs replaced. Each replacement is a function that creates the input."""

    def inputs() -> dict[str, Any]:
        return case.inputs() | {name: make() for name, make in changes.items()}

    return replace(case, name=f"{case.name} {words}", inputs=inputs)


_FROM_SPEC: dict[str, Callable[[dict[str, Any], str], DryCase]] = {
    "cross_entropy": _cross_entropy_from_spec,
    "norm": _norm_from_spec,
    "pooling": lambda constants, dtype: _pooling(dtype, constants["BLOCK_D"], constants["KIND"], constants["NORM"]),
    "rotary": lambda constants, dtype: _rotary(dtype, constants["N"], 2 * constants["F"]),
    "splice": lambda constants, dtype: _splice(dtype, constants["BLOCK_D"]),
    "swiglu": lambda constants, dtype: _swiglu(dtype, constants["F"]),
}

_VARIANTS: dict[str, Callable[[], Iterator[DryCase]]] = {
    "attention": _attention_variants,
    "cross_entropy": _cross_entropy_variants,
    "norm": _norm_variants,
    "pooling": _pooling_variants,
    "rotary": _rotary_variants,
    "splice": _splice_variants,
    "swiglu": _swiglu_variants,
}

"""Compile kernels without a GPU. Each kernel lists its variants in `compile_specs`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

LAUNCH_OPTIONS: Mapping[str, Any] = {"enable_fp_fusion": True}
"""Options of every launch and every compilation. a * b + c is rounded once, which is Triton's default up to 3.9 but not
from 3.10 on. Scores, rotations and norms are then more accurate and cheaper, and do not depend on the version."""


@dataclass(frozen=True, kw_only=True)
class CompileSpec:
    """One kernel with one config and one set of argument types, for the offline compiler."""

    name: str
    """Unique name with kernel, dtype and shape, such as "rms_norm_forward bf16 D=3072"."""

    fn: Any
    """The `@triton.jit` function."""

    signature: Mapping[str, str]
    """Type of each argument that is not a constant, in any order: "*bf16", "*fp32", "*i32", "i32", "i64", "fp32"."""

    constexprs: Mapping[str, Any]
    """Value of each `tl.constexpr` argument."""

    num_warps: int
    num_stages: int = 3
    """The default is Triton's own default for launches."""

    hip_num_warps: int | None = None
    """Warps on AMD. A warp has 64 lanes there, and a program at most 1024 threads. None: same as num_warps."""

    divisible_by_16: tuple[str, ...] = ()
    """Arguments that are multiples of 16 (pointers: aligned to 16 bytes). A launch detects this itself."""

    uses_dot: bool = False
    """Whether the machine code must contain tensor-core instructions."""


def arguments_of(
    fn: Any,
    dtype: str,
    constexprs: Mapping[str, Any],
    *,
    types: Mapping[str, str] = MappingProxyType({}),
    odd: Sequence[str] = (),
) -> dict[str, Any]:
    """`signature`, `constexprs` and `divisible_by_16` of a kernel.

    Its arguments are mostly pointers `p_…` to `dtype` and integers.

    constexprs: the kernel's constants.
    types: types of the other arguments.
    odd: integers that a launch need not find to be multiples of 16. All others are, except floats.
    """
    names = [name for name in fn.arg_names if name not in constexprs]
    signature = {name: types.get(name, f"*{dtype}" if name.startswith("p_") else "i32") for name in names}
    divisible = tuple(name for name in names if name not in odd and signature[name] != "fp32")
    return {"signature": signature, "constexprs": constexprs, "divisible_by_16": divisible}


def compile_spec(spec: CompileSpec, target: Any) -> Any:
    """Compile a kernel without a GPU.

    target: a `triton.backends.compiler.GPUTarget`, such as GPUTarget("cuda", 90, 32).

    Raises ValueError if signature and constants do not match the kernel's arguments, or under TRITON_INTERPRET=1.
    """
    import triton
    from triton.compiler import ASTSource

    if not isinstance(spec.fn, triton.JITFunction):
        raise ValueError(f"{spec.name}: not a triton.jit function; TRITON_INTERPRET=1 must not be set when compiling")
    _check_globals(spec)
    arg_names = list(spec.fn.arg_names)
    given = sorted([*spec.signature, *spec.constexprs])
    if given != sorted(arg_names):
        differing = sorted(set(given) ^ set(arg_names))
        raise ValueError(f"{spec.name}: signature and constexprs do not match the kernel's arguments: {differing}")
    signature = {arg: spec.signature.get(arg, "constexpr") for arg in arg_names}
    attrs = {(arg_names.index(arg),): [["tt.divisibility", 16]] for arg in spec.divisible_by_16}
    source = ASTSource(fn=spec.fn, signature=signature, constexprs=dict(spec.constexprs), attrs=attrs)
    num_warps = spec.hip_num_warps if target.backend == "hip" and spec.hip_num_warps else spec.num_warps
    options = {"num_warps": num_warps, "num_stages": spec.num_stages, **LAUNCH_OPTIONS}
    return triton.compile(source, target=target, options=options)


def _check_globals(spec: CompileSpec) -> None:
    """Raise ValueError if a launch would consider a global of the kernel changed. NaN differs from itself."""
    _ = spec.fn.cache_key  # collects the globals
    for (name, _), (seen, scope) in spec.fn.used_global_vals.items():
        if scope.get(name) != seen:
            raise ValueError(f"{spec.name}: a launch would refuse the global {name} = {seen}; move it into the kernel")

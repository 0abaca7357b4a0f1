"""Comparisons of kernels: the error is at most twice that of torch in the same dtype, both against float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import arc_kernels as ak
from arc_kernels._dispatch import Choice

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Function = Callable[..., Tensor | tuple[Tensor, ...]]


def assert_close_as_torch(ours: Tensor, torch_same_dtype: Tensor, exact: Tensor, name: str) -> None:
    """Check the largest error and the root mean square error of `ours`.

    Each may be at most twice torch's error plus one rounding of the dtype: half of eps times the largest or the root
    mean square value. The rounding is added because torch may happen to be exact if a fair implementation rounds once.

    ours: the result of the kernel.
    torch_same_dtype: the result of torch, with the same shape and dtype.
    exact: the exact result, float64 with the same shape.
    name: name of the tensor, for messages.
    """
    assert ours.dtype == torch_same_dtype.dtype, f"{name}: dtype {ours.dtype}, torch's is {torch_same_dtype.dtype}"
    assert ours.shape == exact.shape == torch_same_dtype.shape, f"{name}: shape {ours.shape}, exact {exact.shape}"
    assert exact.dtype == torch.float64 and bool(exact.isfinite().all()), f"{name}: the exact values are unusable"
    assert bool(ours.isfinite().all()), f"{name}: {int((~ours.isfinite()).sum())} values are not finite"
    if ours.numel() == 0:
        return
    rounding = torch.finfo(ours.dtype).eps / 2
    for size in (_largest, _root_mean_square):
        error, torchs = size(ours.double() - exact), size(torch_same_dtype.double() - exact)
        bound = 2 * torchs + rounding * size(exact)
        kind = size.__name__[1:]
        assert error <= bound, f"{name}: {kind} error {error:.3g}, bound {bound:.3g}; torch errs by {torchs:.3g}"


def assert_kernel_close(
    kernel: Function, reference: Function, inputs: Mapping[str, Tensor], *, wants_grad: tuple[str, ...]
) -> None:
    """Compare outputs and gradients of `kernel` with `reference`.

    Both are called with the inputs by keyword. The exact values come from `reference` on the same numbers in float64.
    The gradients of the outputs are random numbers in the outputs' dtype, equal in all three runs.

    wants_grad: names of the inputs whose gradients are compared.
    """
    wide = in_dtype(inputs, torch.float64)
    ours = outputs_and_gradients(kernel, inputs, wants_grad=wants_grad)
    torchs = outputs_and_gradients(reference, inputs, wants_grad=wants_grad)
    seeds_dtypes = {name: value.dtype for name, value in torchs.items()}
    exact = outputs_and_gradients(reference, wide, wants_grad=wants_grad, seed_dtypes=seeds_dtypes)
    for name, value in ours.items():
        assert_close_as_torch(value, torchs[name], exact[name], name)


def assert_same_bits(function: Function, inputs: Mapping[str, Tensor], *, wants_grad: tuple[str, ...]) -> None:
    """Check that repeating, checkpointing and compiling `function` change no bit of its outputs and gradients."""
    torch.use_deterministic_algorithms(False)  # no help from torch
    torch.compiler.reset()  # otherwise the compilations of earlier tests count against the limit of recompilations
    variants: dict[str, Function] = {
        "repeated": function,
        "checkpointed": lambda **x: checkpoint(function, **x, use_reentrant=False),
        "compiled": torch.compile(function, backend="aot_eager", fullgraph=True),
    }
    plain = outputs_and_gradients(function, inputs, wants_grad=wants_grad)
    for name, variant in variants.items():
        values = outputs_and_gradients(variant, inputs, wants_grad=wants_grad)
        differing = [key for key in plain if not torch.equal(values[key], plain[key])]
        assert not differing, f"{name}: {differing}"


def assert_exact(ours: Tensor, expected: Tensor, inputs: Sequence[Tensor], *, atol: float) -> None:
    """Check a result in float64 and its gradients against another computation of the same result.

    inputs: leaves of both graphs; each must have a gradient other than zero.
    atol: bound of the largest difference.
    """
    assert torch.allclose(ours, expected, rtol=0, atol=atol)
    seed = torch.randn(ours.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    got, wanted = (torch.autograd.grad(y, inputs, seed, retain_graph=True) for y in (ours, expected))
    for one, other in zip(got, wanted, strict=True):
        assert other.abs().max() > 0
        assert torch.allclose(one, other, rtol=0, atol=atol)


def assert_refused(
    call: Callable[[], object], message: str, *, choices: tuple[Choice, ...] = ("triton", "reference")
) -> None:
    """Check that a call raises a ValueError with this message under each implementation."""
    for choice in choices:
        with ak.use(choice), pytest.raises(ValueError, match=message):
            call()


def in_dtype(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs with all floats in the given dtype."""
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def outputs_and_gradients(
    function: Function,
    inputs: Mapping[str, Tensor],
    *,
    wants_grad: tuple[str, ...],
    seed_dtypes: Mapping[str, torch.dtype] | None = None,
) -> dict[str, Tensor]:
    """{"output 0": …, "gradient of x": …}: outputs, and input gradients for fixed random output gradients.

    seed_dtypes: for "output i", the dtype to which its gradient is rounded first (default: the output's dtype).
    """
    leaves = {name: x.detach().clone().requires_grad_(name in wants_grad) for name, x in inputs.items()}
    result = function(**leaves)
    outputs = (result,) if isinstance(result, Tensor) else tuple(result)
    values = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    if not wants_grad:
        return values
    reached = {i: output for i, output in enumerate(outputs) if output.requires_grad}
    seeds = []
    for i, output in reached.items():
        seed = torch.randn(output.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        dtype = output.dtype if seed_dtypes is None else seed_dtypes[f"output {i}"]
        seeds.append(seed.to(dtype).to(output.device, output.dtype))
    gradients = torch.autograd.grad(tuple(reached.values()), [leaves[name] for name in wants_grad], seeds)
    return values | {f"gradient of {name}": g for name, g in zip(wants_grad, gradients, strict=True)}


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


def _root_mean_square(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())

"""Correctness checks of the cases. A wrong result is not timed."""

from __future__ import annotations

from typing import Any, Literal

import torch
from gpu_cases import Case
from torch import Tensor

import arc_kernels as ak


def check_case(case: Case, device: torch.device) -> list[str]:
    """List the faults in the kernel's outputs and gradients.

    The largest error and the mean square error of each may be at most twice those of the reference in bfloat16, both
    against the reference in float32. Half a unit in the last place is added, in case the reference happens to be exact.
    """
    inputs = case.inputs(device)
    exact = _results(case, {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}, "reference")
    torchs = _results(case, inputs, "reference")
    ours = _results(case, inputs, "triton")
    findings = []
    for name, value in ours.items():
        error, allowed = value.float() - exact[name], torchs[name].float() - exact[name]
        rounding = torch.finfo(value.dtype).eps / 2
        for kind, size in (("largest", _largest), ("mean square", _root_mean_square)):
            bound = 2 * size(allowed) + rounding * size(exact[name])
            if not size(error) <= bound:
                findings.append(f"{name}: {kind} error {size(error):.3g}, bound {bound:.3g}")
    return findings


def same_result(theirs: Any, ours: Any) -> bool:
    """Whether another implementation computes the same up to rounding. It may return a sum instead of its terms."""
    theirs, ours = as_tuple(theirs), as_tuple(ours)
    if len(theirs) != len(ours):
        return False
    for their, our in zip(theirs, ours, strict=True):
        if their.shape != our.shape:
            our = our.sum()
            if their.shape != our.shape:
                return False
        if not _root_mean_square(their.float() - our.float()) <= 0.02 * _root_mean_square(our.float()):
            return False
    return True


def _results(case: Case, inputs: dict[str, Tensor], choice: Literal["triton", "reference"]) -> dict[str, Tensor]:
    """Outputs, and gradients for fixed random gradients of the outputs."""
    leaves = {name: x.detach().clone().requires_grad_(name in case.wants_grad) for name, x in inputs.items()}
    with ak.use(choice):
        outputs = as_tuple(case.function(**leaves))
        seeds = []
        for i, output in enumerate(outputs):
            generator = torch.Generator(output.device).manual_seed(1000 + i)  # not the generator of the inputs
            seed = torch.randn(output.shape, generator=generator, device=output.device)
            seeds.append(seed.bfloat16().to(output.dtype))
        gradients = torch.autograd.grad(outputs, [leaves[name] for name in case.wants_grad], seeds)
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return results | {f"gradient of {n}": g for n, g in zip(case.wants_grad, gradients, strict=True)}


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    """The outputs of a function, which returns a tensor or a tuple of them."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


def _root_mean_square(x: Tensor) -> float:
    return float(x.detach().float().square().mean().sqrt())

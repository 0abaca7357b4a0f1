"""The choice of implementation, and the boundary checks of all kernels."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import arc_kernels as ak
from arc_kernels._check import check_boundaries
from arc_kernels._dispatch import _gpu_is_supported, use_triton
from tests.kernels.bounds import assert_close_as_torch


def test_auto_takes_triton_on_a_gpu_alone(device: torch.device) -> None:
    assert use_triton(torch.ones(1, device=device)) == (device.type == "cuda")
    assert not use_triton(torch.ones(1, device=device, dtype=torch.float64))


@pytest.mark.skipif(torch.version.hip is not None, reason="every ROCm device is taken")
def test_gpus_before_ampere_are_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    for (major, minor), supported in (((7, 5), False), ((8, 0), True), ((8, 9), True), ((12, 0), True)):
        properties = SimpleNamespace(major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index, found=properties: found)
        assert _gpu_is_supported(0) == supported


def test_the_environment_is_read_at_every_call(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    x = torch.ones(1, device=device)
    for choice, expected in (("triton", True), ("reference", False)):
        monkeypatch.setenv("ARC_KERNELS", choice)
        assert use_triton(x) == expected
    monkeypatch.setenv("ARC_KERNELS", "cuda")
    with pytest.raises(ValueError, match="ARC_KERNELS is 'cuda'; expected one of auto, triton, reference"):
        use_triton(x)


def test_the_innermost_context_decides_and_ends_with_an_error_too(device: torch.device) -> None:
    x = torch.ones(1, device=device)
    with ak.use("reference"):
        with pytest.raises(RuntimeError), ak.use("triton"):
            assert use_triton(x)
            raise RuntimeError
        assert not use_triton(x)
    with pytest.raises(ValueError, match="choice is 'fast'"), ak.use("fast"):  # type: ignore[arg-type]
        pass


def test_a_compiled_function_may_contain_the_context(device: torch.device) -> None:
    def gate(x: torch.Tensor) -> torch.Tensor:
        with ak.use("triton"):
            return ak.swiglu(x, x)

    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(torch.compile(gate, backend="aot_eager", fullgraph=True)(x), gate(x))


def test_triton_without_a_gpu_or_an_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with ak.use("triton"), pytest.raises(ValueError, match="the tensor is on cpu; move it to a GPU"):
        use_triton(torch.ones(1))


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, arc_kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 3, 5], "cu starts at 1; expected 0"),
        ([0, 3, 4], "cu ends at 4; expected the number of rows, 5"),
        ([0, 4, 2, 5], "cu decreases at segment 1: from 4 to 2"),
        ([0, 2, 2, 5], "cu is empty at segment 1"),
    ],
)
def test_boundaries_that_do_not_fit_are_refused(values: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_boundaries("cu", torch.tensor(values, dtype=torch.int32), total=5)


def test_good_boundaries_pass_and_other_types_do_not() -> None:
    check_boundaries("cu", torch.tensor([0, 1, 5], dtype=torch.int32), total=5)
    check_boundaries("cu", torch.tensor([0], dtype=torch.int32), total=0)
    for wrong in (torch.tensor([0, 5]), torch.zeros(1, 2, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)):
        with pytest.raises(ValueError, match="expected int32 boundaries"):
            check_boundaries("cu", wrong, total=5)


@pytest.mark.usefixtures("poisoned_empty")
def test_memory_that_was_never_written_shows() -> None:
    x = torch.ones(3)
    for empty in (torch.empty(3), torch.empty_like(x), x.new_empty(3)):
        assert bool(empty.isnan().all())
        with pytest.raises(AssertionError, match="not finite"):
            assert_close_as_torch(empty, x, x.double(), "x")


def test_the_bound_is_twice_torchs_error_and_one_rounding() -> None:
    exact = torch.full((4,), 1.0, dtype=torch.float64)
    torchs = torch.full((4,), 1.0 + 2**-7, dtype=torch.bfloat16)
    assert_close_as_torch(torch.full_like(torchs, 1.0 + 2**-6), torchs, exact, "x")
    with pytest.raises(AssertionError, match="bound"):
        assert_close_as_torch(torch.full_like(torchs, 1.0 + 3 * 2**-7), torchs, exact, "x")

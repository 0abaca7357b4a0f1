"""The kernels pass Triton's JIT without a GPU, and the dry launch detects launches that would fail on a GPU.

`kernels/benchmarks/dry_launch.py` has the whole list; this file launches one configuration of each kernel. It takes
about half a minute on two CPU cores (AMD EPYC, empty cache).
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from tests.kernels.programs import BENCHMARKS, benchmark, run_python

dry_launch = benchmark("dry_launch")
PROGRAM = str(BENCHMARKS / "dry_launch.py")
ONE_OF_EACH = (
    r"^(attention bf16 H=64 K=8 group=(4 causal longest=130 turned|2 causal longest=130 window=1)|rms_norm bf16 D=16384"
    r"|mean rms bf16 D=4096|rotary bf16 N=32 H=128|swiglu bf16 F=14336|splice bf16 D=4096"
    r"|linear_cross_entropy bf16 V=16384 D=64)$"
)
LAUNCHES = {
    "forward_kernel": 2,  # without and with a window
    "delta_kernel": 2,
    "dq_kernel": 2,
    "dkv_kernel": 2,
    "norm_forward_kernel": 1,
    "norm_backward_kernel": 1,
    "weight_gradient_kernel": 1,
    "pool_forward_kernel": 1,
    "pool_backward_kernel": 1,
    "rotary_kernel": 3,  # forward and backward of rotary itself, and attention's keys
    "swiglu_forward_kernel": 1,
    "swiglu_backward_kernel": 1,
    "_splice_forward": 1,
    "_gather_rows": 1,
    "_sum_runs": 1,
    "_softmax_minus_label": 1,
    "_scale_rows": 1,
}

TWO = "swiglu bf16 F=(8192|14336)"  # cases of swiglu; the first fails in some of the tests

# The imports of programs that launch cases themselves.
CASES = "import dry_launch\nfrom dry_cases import cases_of\nfrom dry_launch import dry_launches, launch_case\n"


@pytest.mark.slow
def test_each_kernel_is_launched_forward_and_backward() -> None:
    result = run_python(PROGRAM, "--select", ONE_OF_EACH, "--jobs", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert _counts(result.stdout) == LAUNCHES
    assert "8 cases, 23 launches of 17 kernels for sm_90: 0 failed" in result.stdout


@pytest.mark.slow
def test_a_global_that_is_nan_fails_the_cases_of_its_kernels() -> None:
    """Triton compares the globals that a kernel reads with their values at compilation. NaN differs from itself."""
    program = (
        "import dry_launch, triton.language as tl\n"
        "from arc_kernels import _interpreter\n"
        "_interpreter.INTERPRETED = tl.constexpr(float('nan'))\n"  # read by `narrow`
        "arguments = ['--kernel', 'splice', 'swiglu', '--select', 'fp32 [DF]=100', '--jobs', '1']\n"
        "raise SystemExit(dry_launch.main(arguments))\n"
    )
    result = run_python("-c", program)
    assert result.returncode == 1, result.stdout + result.stderr
    for case in ("splice fp32 D=100", "swiglu fp32 F=100"):
        assert f"{case}: FAILED: RuntimeError: Global variable INTERPRETED has changed" in result.stdout
    assert "sm_90: 2 failed" in result.stdout


@pytest.mark.slow
def test_an_argument_left_out_of_one_launch_fails_that_case_alone() -> None:
    program = (
        "import dry_launch\n"
        "from arc_kernels.swiglu.kernels import swiglu_backward_kernel as kernel\n"
        "run = kernel.run\n"
        "def without_width(*arguments, F, **others):\n"
        "    return run(*arguments, **others) if F == 8192 else run(*arguments, F=F, **others)\n"
        "kernel.run = without_width\n"
        f"raise SystemExit(dry_launch.main(['--kernel', 'swiglu', '--select', {TWO!r}, '--jobs', '1']))\n"
    )
    result = run_python("-c", program)
    assert result.returncode == 1, result.stdout + result.stderr
    failed = [line for line in result.stdout.splitlines() if "FAILED" in line]
    assert failed and all("F=8192" in line for line in failed)
    assert all("TypeError: dynamic_func() missing 1 required positional argument: 'F'" in line for line in failed)
    # The case after the failures:
    assert "swiglu bf16 F=14336: swiglu_forward_kernel, swiglu_backward_kernel" in result.stdout
    assert f"sm_90: {len(failed)} failed" in result.stdout


@pytest.mark.slow
def test_a_call_that_launches_nothing_fails() -> None:
    program = CASES + (
        "from dataclasses import replace\n"
        "import torch, arc_kernels as ak\n"
        "case = cases_of('swiglu')['swiglu fp32 F=100']\n"
        "def reference(**inputs):\n"
        "    with ak.use('reference'):\n"
        "        return ak.swiglu(**inputs)\n"
        "def without_gradient(gate_TF, up_TF):\n"
        "    return ak.swiglu(gate_TF.detach(), up_TF.detach()) + gate_TF + up_TF\n"
        "for function in (reference, without_gradient):\n"
        "    with dry_launches() as driver:\n"
        "        try:\n"
        "            launch_case(replace(case, function=function), driver)\n"
        "        except ValueError as error:\n"
        "            print(error, [launch.kernel for launch in driver.launches])\n"
    )
    result = run_python("-c", program)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "forward launched nothing []",
        "backward launched nothing ['swiglu_forward_kernel']",
    ]


@pytest.mark.slow
def test_a_whole_run_names_kernels_and_specs_that_were_not_launched() -> None:
    program = CASES + (
        "from dataclasses import replace\n"
        "from compile_offline import specs_of\n"
        "with dry_launches() as driver:\n"
        "    for case in cases_of('swiglu').values():\n"
        "        launch_case(case, driver)\n"
        "missing = lambda launches: print(*dry_launch.missing_launches(launches, ['swiglu']), sep='; ')\n"
        "missing(driver.launches)\n"
        "missing([])\n"
        "missing([launch for launch in driver.launches if 'backward' not in launch.kernel])\n"
        "missing([*driver.launches, replace(driver.launches[0], kernel='other')])\n"
        "specs = specs_of('swiglu', 'sm_90')\n"
        "name = 'swiglu_forward bf16 F=8192'\n"
        "for change in ({'num_warps': 8}, {'num_stages': 4}, {'constexprs': {'F': 8192, 'BF': 512}},\n"
        "               {'divisible_by_16': ()}, {'signature': {}}):\n"
        "    changed = specs | {name: replace(specs[name], **change)}\n"
        "    dry_launch.specs_of = lambda kernel, target: changed if kernel == 'swiglu' else specs_of(kernel, target)\n"
        "    missing(driver.launches)\n"
        "dry_launch.specs_of = specs_of\n"
        "dry_launch.cases_of = lambda kernel: {'swiglu fp32 F=1': cases_of(kernel)['swiglu fp32 F=1']}\n"
        "raise SystemExit(dry_launch.main(['--kernel', 'swiglu', '--jobs', '1']))\n"
    )
    result = run_python("-c", program)
    assert result.returncode == 1, result.stderr
    forward, backward = "swiglu_forward_kernel was never launched", "swiglu_backward_kernel was never launched"
    assert result.stdout.splitlines()[:9] == [
        "",
        f"{forward}; {backward}",
        backward,
        "other was launched, but has no spec",
        *["no launch equals the spec 'swiglu_forward bf16 F=8192'"] * 5,
    ]
    assert "1 cases, 2 launches of 2 kernels for sm_90: 0 failed, 8 missing" in result.stdout


@pytest.mark.slow
def test_what_the_chip_does_not_have_is_refused_and_nothing_stays_behind() -> None:
    program = CASES + (
        "from unittest.mock import patch\n"
        "import torch, triton, arc_kernels as ak, machine_code\n"
        "from arc_kernels.swiglu import kernels as swiglu\n"
        "x = torch.zeros(2, 8192)\n"
        "def attempt(function):\n"
        "    try:\n"
        "        with dry_launches() as driver:\n"
        "            function()\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, ' '.join(str(error).split()), len(driver.launches))\n"
        "with patch.object(swiglu, 'choose', lambda *_, **__: (1024, 64)):\n"
        "    attempt(lambda: ak.swiglu(x, x))\n"
        "machine_code.SHARED_LIMIT['sm_90'] = 1024\n"
        "attention = cases_of('attention')['attention fp16 H=64 K=8 group=2 full longest=130']\n"
        "attempt(lambda: attention.function(**attention.inputs()))\n"
        "print(triton.runtime.driver._active)\n"
        "with ak.use('triton'):\n"
        "    ak.swiglu(x, x)\n"
    )
    result = run_python("-c", program)
    threads, shared, active = result.stdout.splitlines()
    assert threads.startswith("OutOfResources") and "threads" in threads and threads.endswith(" 0")
    assert shared.startswith("OutOfResources") and "shared memory" in shared and shared.endswith(" 0")
    assert active == "None"
    assert "Triton kernels were requested, but the tensor is on cpu" in result.stderr  # as before the context


@pytest.mark.parametrize("grid", [(0, 1, 1), (2, -1, 1), (2.0, 1, 1), (True, 1, 1), (1, 65536, 1), (2**31, 1, 1)])
def test_a_grid_that_cuda_refuses_is_refused(grid: tuple[Any, ...]) -> None:
    driver = dry_launch.DryDriver()
    with pytest.raises(ValueError, match="the grid of fill is"):
        _launch(driver, *grid)
    assert driver.launches == []
    _launch(driver, 2**31 - 1, 65535, 1)
    assert [launch.grid for launch in driver.launches] == [(2**31 - 1, 65535, 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel", "no_such"], "invalid choice: 'no_such'"),
        (["--select", "no_such"], "no case's name matches 'no_such'"),
    ],
)
def test_an_unknown_kernel_and_a_selection_of_nothing_are_refused(arguments: list[str], message: str) -> None:
    result = run_python(PROGRAM, *arguments)
    assert result.returncode == 2
    assert message in result.stderr


def _launch(driver: Any, *grid: Any) -> None:
    """Call the launcher of a kernel without arguments, like Triton."""
    source = SimpleNamespace(fn=SimpleNamespace(__name__="fill", arg_names=[]), signature={}, constants={}, attrs={})
    metadata = SimpleNamespace(num_warps=4, num_stages=3)
    driver.launcher_cls(source, metadata)(*grid, 0, object(), (), None, None, None)


def _counts(output: str) -> dict[str, int]:
    """Number of launches of each kernel, from the program's last lines."""
    found = re.search(r"^launches: (.*)$", output, re.MULTILINE)
    assert found, output
    return {name: int(count) for name, count in (item.split() for item in found[1].split(", "))}

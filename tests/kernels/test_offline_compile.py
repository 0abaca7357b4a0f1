"""The kernels compile without the target chips, without spills and within the chips' shared memory.

`kernels/benchmarks/compile_offline.py` compiles the whole table. This test compiles a selection: every matrix kernel at
one config per chip (with rotary inside, which takes the most registers), and every elementwise kernel at one width. It
takes about 70 s on two CPU cores (AMD EPYC, empty cache).
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.programs import BENCHMARKS, benchmark, run_python

machine_code = benchmark("machine_code")
KERNELS = BENCHMARKS.parent / "arc_kernels"
ELEMENTWISE = (
    r"^((rms|add_rms)_norm_forward|add_rms_norm_backward_weight|pool_(forward|backward)|splice_forward|gather_rows"
    r"|sum_runs|scale_rows) bf16 D=4096( mean rms)?$|^swiglu_\w+ bf16 F=14336$|^rotary bf16 N=32 H=128$"
    r"|^softmax_minus_label bf16 V=128256 gradient$"
)
MATRIX = r"^attention_(forward|dq|dkv) bf16 H=128 group=4 causal rows=4096 turned |^attention_delta bf16 H=128$"

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function some_kernel:
  REG:{registers} STACK:{stack} SHARED:{shared} LOCAL:{local} CONSTANT[0]:400 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;               /* 0x00000a0000017a02 */
        /*0010*/              @!P0 HMMA.16816.F32.BF16 R4, R8, R12, R4 ; /* 0x0000000c0804723c */
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ; /* 0x00 */
        /*0030*/              @UP1 {spill} [R1+0x10], R9 ;                 /* 0x0000100901007387 */
"""
ASSEMBLY = """
some_kernel:
\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[2:3], v[4:5], a[0:15]
\t{spill} off, v1, s32 offset:8
amdhsa.kernels:
  - .agpr_count:     32
    .args:           []
    .group_segment_fixed_size: {shared}
    .private_segment_fixed_size: {scratch}
    .sgpr_spill_count: 0
    .vgpr_count:     288
    .vgpr_spill_count: {spilled}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("select", "num_rows", "targets"),
    [(MATRIX, 4, ["sm_80", "sm_86", "sm_90", "gfx942"]), (ELEMENTWISE, 13, ["sm_86", "sm_90", "gfx942"])],
    ids=["matrix", "elementwise"],
)
def test_no_kernel_spills_or_outgrows_its_chip(select: str, num_rows: int, targets: list[str]) -> None:
    result = run_python(str(BENCHMARKS / "compile_offline.py"), "--select", select, "--target", *targets)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = f"{len(targets) * num_rows} compiled for {', '.join(targets)}: 0 with problems"
    assert summary in result.stdout, result.stdout


@pytest.mark.slow
def test_a_kernel_with_too_few_threads_spills_and_is_reported() -> None:
    # One warp for a row of 8192: 256 values per thread, but a thread has only 255 registers.
    program = (
        "from dataclasses import replace\n"
        "from compile_offline import resources_of, specs_of\n"
        "from machine_code import problems\n"
        "spec = replace(specs_of('norm', 'sm_80')['rms_norm_forward bf16 D=8192'], num_warps=1)\n"
        "print(problems(resources_of(spec, 'sm_80'), target='sm_80', needs='HMMA'))\n"
    )
    result = run_python("-c", program)
    assert result.returncode == 0, result.stderr
    assert "spills" in result.stdout and "has no HMMA instruction" in result.stdout


def test_a_spec_that_does_not_compile_is_a_row_and_the_exit_code_is_1() -> None:
    program = (
        "from dataclasses import replace\n"
        "import compile_offline\n"
        "specs = compile_offline.specs_of('swiglu', 'sm_80')\n"
        "name = 'swiglu_forward bf16 F=8192'\n"
        "specs[name] = replace(specs[name], constexprs={'F': 8192, 'BF': 1000})\n"
        "arguments = ['--kernel', 'swiglu', '--target', 'sm_80', '--select', name, '--jobs', '1']\n"
        "raise SystemExit(compile_offline.main(arguments))\n"
    )
    result = run_python("-c", program)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "does not compile" in result.stdout and "1 with problems" in result.stdout


def test_a_kernel_that_a_launch_would_refuse_is_refused(tmp_path: Path) -> None:
    """A launch compares the globals that a kernel reads with their values at compilation. NaN differs from itself."""
    (tmp_path / "bad_kernel.py").write_text(
        "import triton\nimport triton.language as tl\n"
        "NAN = tl.constexpr(float('nan'))\n\n"
        "@triton.jit\ndef fill(p, BLOCK: tl.constexpr):\n"
        "    tl.store(p + tl.arange(0, BLOCK), tl.full((BLOCK,), NAN, tl.float32))\n"
    )
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from bad_kernel import fill\n"
        "from arc_kernels._compile import CompileSpec, compile_spec\n"
        "from triton.backends.compiler import GPUTarget\n"
        "spec = CompileSpec(name='fill', fn=fill, signature={'p': '*fp32'}, constexprs={'BLOCK': 64}, num_warps=1)\n"
        "compile_spec(spec, GPUTarget('cuda', 90, 32))\n"
    )
    result = run_python("-c", program)
    assert result.returncode != 0 and "a launch would refuse the global NAN" in result.stderr


@pytest.mark.parametrize("kernel", ["attention", "cross_entropy", "norm", "pooling", "rotary", "splice", "swiglu"])
def test_every_launch_says_what_triton_would_decide_by_its_version(kernel: str) -> None:
    """Every launch passes LAUNCH_OPTIONS, directly or through the shared arguments of attention's launches."""
    tree = ast.parse((KERNELS / kernel / "kernels.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)]
    unpacked = [{ast.unparse(k.value).split("(")[0] for k in call.keywords if k.arg is None} for call in calls]
    assert calls and all(names & {"LAUNCH_OPTIONS", "arguments"} for names in unpacked), unpacked


@pytest.mark.parametrize("program", ["compile_offline.py", "dry_launch.py"])
def test_the_interpreter_is_refused(program: str) -> None:
    result = run_python(str(BENCHMARKS / program), interpret=True)
    assert result.returncode == 2
    assert "TRITON_INTERPRET" in result.stderr


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_figures_of_a_cubin(target: str) -> None:
    text = USAGE.format(registers=168, stack=0, shared=0, local=0) + SASS.format(spill="STG.E")
    resources = machine_code.nvidia_resources(text, target=target, launch_shared=4096)
    assert resources.registers == 168
    assert (resources.spill_bytes, resources.spill_instructions) == (0, 0)
    assert resources.shared_bytes == 4096
    assert resources.matrix_instructions == {"HMMA": 1, "HGMMA": 1}
    assert machine_code.problems(resources, target=target, needs="HGMMA") == []


@pytest.mark.parametrize(
    ("stack", "local", "spill"), [(56, 0, "STG.E"), (0, 16, "STG.E"), (0, 0, "STL"), (0, 0, "LDL.64")]
)
def test_each_sign_of_a_spill_in_a_cubin_counts(stack: int, local: int, spill: str) -> None:
    text = USAGE.format(registers=255, stack=stack, shared=0, local=local) + SASS.format(spill=spill)
    resources = machine_code.nvidia_resources(text, target="sm_80", launch_shared=0)
    assert any("spills" in problem for problem in machine_code.problems(resources, target="sm_80", needs=None))


def test_static_and_launch_shared_memory_add_up_but_for_what_hopper_reserves() -> None:
    text = USAGE.format(registers=64, stack=0, shared=3072, local=0) + SASS.format(spill="STG.E")
    sizes = {
        target: machine_code.nvidia_resources(text, target=target, launch_shared=1000).shared_bytes
        for target in ("sm_80", "sm_90")
    }
    assert sizes == {"sm_80": 4072, "sm_90": 3048}


@pytest.mark.parametrize(("target", "limit_kib"), [("sm_80", 163), ("sm_86", 99), ("sm_90", 227), ("gfx942", 64)])
def test_one_byte_above_the_chips_shared_memory_is_too_much(target: str, limit_kib: int) -> None:
    def found(shared_bytes: int) -> list[str]:
        return machine_code.problems(_resources(shared_bytes=shared_bytes), target=target, needs=None)

    assert found(limit_kib * 1024) == []
    assert "shared memory" in found(limit_kib * 1024 + 1)[0]


@pytest.mark.parametrize(
    ("target", "tile_rows", "opcode"),
    [("sm_80", 128, "HMMA"), ("sm_90", 64, "HGMMA"), ("sm_90", 32, "HMMA"), ("gfx942", 128, "v_mfma")],
)
def test_a_matrix_kernel_without_its_matrix_instructions_is_wrong(target: str, tile_rows: int, opcode: str) -> None:
    others = {"HMMA": 8, "HGMMA": 8, "v_mfma": 8} | {opcode: 0}
    resources = _resources(matrix_instructions=others)
    assert machine_code.matrix_opcode(target, tile_rows) == opcode
    assert machine_code.problems(resources, target=target, needs=None) == []
    (problem,) = machine_code.problems(resources, target=target, needs=opcode)
    assert opcode in problem


@pytest.mark.parametrize(
    ("scratch", "spilled", "spill", "spills"),
    [(0, 0, "global_store_dword", False), (24, 0, "global_store_dword", True), (0, 3, "global_store_dword", True)]
    + [(0, 0, "scratch_store_dword", True), (0, 0, "scratch_load_dwordx4", True)],
)
def test_figures_of_amd_assembly(scratch: int, spilled: int, spill: str, spills: bool) -> None:
    text = ASSEMBLY.format(shared=512, scratch=scratch, spilled=spilled, spill=spill)
    resources = machine_code.amd_resources(text, launch_shared=1024)
    assert (resources.registers, resources.shared_bytes, resources.matrix_instructions["v_mfma"]) == (288, 1536, 1)
    assert bool(machine_code.problems(resources, target="gfx942", needs="v_mfma")) == spills


def test_output_without_figures_is_an_error() -> None:
    with pytest.raises(ValueError, match="no resource usage"):
        machine_code.nvidia_resources("cuobjdump fatal: nothing", target="sm_80", launch_shared=0)
    with pytest.raises(ValueError, match="vgpr_count|private_segment"):
        machine_code.amd_resources("some_kernel:\n", launch_shared=0)


def _resources(**changes: Any) -> Any:
    """A kernel without problems, except for the changes."""
    figures = {"registers": 32, "spill_bytes": 0, "spill_instructions": 0, "shared_bytes": 0, "matrix_instructions": {}}
    return machine_code.Resources(**figures | changes)

"""`tools/gpu_day.py`: it reports a missing GPU, its rehearsal writes every row, and stages do not affect each other."""

from __future__ import annotations

import csv
import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.tiny_run import ROOT
from tests.helpers.waiting import LIMIT_S

pytest.importorskip("triton")

PROGRAM = ROOT / "tools" / "gpu_day.py"
VARIANTS = ("kernels", "plain torch", "kernels, recomputed")
KERNELS = {
    *("attention", "attention_rotary", "rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "rotary"),
    *("swiglu", "pool_norm", "group_pool", "splice", "linear_cross_entropy"),
}


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for folder in (ROOT / "tools", ROOT / "kernels" / "benchmarks"):
        monkeypatch.syspath_prepend(folder)
    return importlib.import_module("gpu_day")


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        timeout=LIMIT_S,
        check=False,
    )


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "cpu.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_without_a_gpu_it_says_so_and_counts_the_step() -> None:
    result = _python(str(PROGRAM))
    assert result.returncode == 2
    assert "No GPU" in result.stdout and "nothing was measured" in result.stderr
    assert "our kernels" in result.stdout and "forward and backward" in result.stdout  # the roofline


def test_an_unknown_stage_is_named() -> None:
    result = _python(str(PROGRAM), "--stages", "step,fats", "--rehearse")
    assert result.returncode == 2 and "fats" in result.stderr and "fast" in result.stderr


@pytest.mark.slow
def test_the_rehearsal_writes_the_rows_of_every_stage(tmp_path: Path) -> None:
    result = _python(str(PROGRAM), "--rehearse", "--out", str(tmp_path), TRITON_INTERPRET="1")
    log = (tmp_path / "gpu_day.log").read_text()
    assert result.returncode == 0, result.stdout + log
    rows = _rows(tmp_path)
    assert all(row["date"] and row["torch"] and row["triton"] and row["commit"] for row in rows)
    assert not any(str(tmp_path) in cell for row in rows for cell in row.values()), "a local path in a row"
    right = [row for row in rows if row["stage"] == "right"]
    assert {row["subject"] for row in right if (row["variant"], row["value"]) == ("check", "right")} == KERNELS
    assert any(row["subject"] == "triton_swiglu" and "passed" in row["value"] for row in right)
    both = {(row["subject"], row["variant"]) for row in rows if row["stage"] == "fast" and row["metric"] == "both"}
    assert {kernel for kernel, variant in both if variant == "arc_kernels"} == KERNELS
    assert {kernel for kernel, variant in both if variant == "torch eager"} == KERNELS
    step = {(row["metric"], row["variant"]): row for row in rows if row["stage"] == "step"}
    for variant in VARIANTS:
        assert float(step["step time", variant]["value"]) > 0 and step["step time", variant]["note"] == "ZeRO-3"
        assert float(step["loss", variant]["ratio"]) == pytest.approx(1, abs=1e-4)
        assert float(step["gradient norm", variant]["ratio"]) == pytest.approx(1, abs=1e-4)
        assert float(step["time in products", variant]["value"]) > 0 and step["floor of all", variant]["value"]
    program = {row["subject"]: row["value"] for row in rows if row["stage"] == "program"}
    assert program["losses"] == "bit-equal" and program["stopped run"] == "exit code 75"
    summary = (tmp_path / "cpu.md").read_text()
    assert all(f"### {stage}" in summary for stage in ("environment", "right", "step", "fast", "program"))


def test_a_stage_that_raises_or_hangs_leaves_one_row_and_the_next_one_runs(
    tools: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = {
        "fast": "import time; time.sleep(600)",
        "right": "raise RuntimeError('no such kernel')",
        "step": "import os; os.kill(os.getpid(), 11)",
        "program": "context.result('program', 'ran')",
    }
    (tmp_path / "fake").mkdir()
    for name, body in stages.items():
        (tmp_path / "fake" / f"{name}.py").write_text(f"def run(context):\n    {body}\n")
    runner = tmp_path / "runner.py"
    runner.write_text(
        f"import sys\nsys.path.insert(0, {str(PROGRAM.parent)!r})\nimport gpu_day, gpu_stages\n"
        f"gpu_stages.__path__.insert(0, {str(tmp_path / 'fake')!r})\nraise SystemExit(gpu_day.main())\n"
    )
    monkeypatch.setattr(tools, "__file__", str(runner))
    monkeypatch.setattr(tools, "GRACE_S", 1.0)
    # Importing torch takes up to ten seconds on a busy machine.
    budgets_s = {name: 5.0 if name == "fast" else 300.0 for name in stages}
    monkeypatch.setattr(tools, "BUDGETS_S", budgets_s)
    day = tools.Day(stages=tuple(stages), minutes=sum(budgets_s.values()) / 60, rehearse=True, out=tmp_path / "out")
    assert tools.run_day(day, None) == 1
    found = {row["stage"]: (row["value"], row["note"]) for row in _rows(tmp_path / "out")}
    assert found["right"] == ("failed", "RuntimeError: no such kernel")
    assert found["step"][0] == "ended early" and "exit code -11" in found["step"][1]
    assert found["fast"][0] == "ended early" and "the time was up" in found["fast"][1]
    assert found["program"][0] == "ran"
    assert "no such kernel" in (tmp_path / "out" / "tracebacks.txt").read_text()


def test_every_case_is_checked_by_one_process(
    tools: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, bench = importlib.import_module("gpu_stages.right"), importlib.import_module("bench_kernels")
    checked: list[tuple[str, str]] = []

    def start(_folder: Path, kernel: str, num_cases: int, *options: str) -> None:
        arguments = bench._parser().parse_args(options)
        assert arguments.check and arguments.full and arguments.warm and arguments.kernel == [kernel]
        of_kernel = [case for case in bench.all_cases(bench.FULL) if case.kernel == kernel]
        found = [case for case in of_kernel if arguments.shape in (None, case.shape)]
        assert len(found) == num_cases
        checked.extend((case.kernel, case.shape) for case in found)

    monkeypatch.setattr(right, "_start_check", start)
    _, context = _step_stage(tmp_path, monkeypatch)
    list(right._start_checks(replace(context, rehearse=False), tmp_path))
    assert sorted(checked) == sorted((case.kernel, case.shape) for case in bench.all_cases(bench.FULL))


def test_a_test_that_kills_its_worker_counts_once_and_a_half_written_line_not_at_all(
    tools: ModuleType, tmp_path: Path
) -> None:
    right = importlib.import_module("gpu_stages.right")
    log = tmp_path / "tests.jsonl"
    reports = [("a", "passed"), ("b", "failed"), ("b", "failed"), ("c", "passed"), ("c", "failed")]
    lines = [f'{{"test": "{test}", "outcome": "{outcome}", "words": ""}}\n' for test, outcome in reports]
    log.write_text("".join(lines) + '{"test": "d", "out')
    found = {entry["test"]: entry["outcome"] for entry in right._read_entries(log)}
    assert found == {"a": "passed", "b": "failed", "c": "failed"}
    assert right._read_entries(tmp_path / "absent") == []


def test_a_file_of_tests_that_cannot_be_imported_is_in_the_log(tools: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "test_good.py").write_text("def test_one():\n    pass\n")
    (tmp_path / "test_bad.py").write_text("import no_such_package\n")
    log, right = tmp_path / "log", importlib.import_module("gpu_stages.right")
    command = ["-m", "pytest", "-q", "-p", "gpu_stages.report_plugin", "--test-log", str(log)]
    command += ["--continue-on-collection-errors", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    _python(*command, PYTHONPATH=str(PROGRAM.parent))
    outcomes = {Path(entry["test"].split("::")[0]).stem: entry for entry in right._read_entries(log)}
    assert {name: entry["outcome"] for name, entry in outcomes.items()} == {"test_good": "passed", "test_bad": "failed"}
    assert "no_such_package" in outcomes["test_bad"]["words"]


def test_a_step_that_fails_is_measured_by_plain_torch_or_with_a_smaller_size(
    tools: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, context = _step_stage(tmp_path, monkeypatch)
    calls: list[tuple[int, str]] = []

    def measure(context: Any, size: Any, engine_name: str) -> None:
        calls.append((size.batch_size, engine_name))
        if context.rehearse and engine_name == "ZeRO-3":
            raise RuntimeError("NCCL does not start")
        if size.batch_size > 4:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(step, "find_spec", lambda _: True)
    monkeypatch.setattr(step, "_measure", measure)
    step.run(context)
    (row,) = _rows(tmp_path)
    assert (row["subject"], row["value"]) == ("step by ZeRO-3", "failed") and "NCCL does not start" in row["note"]
    monkeypatch.setattr(step, "_sizes_that_fit", lambda _: [replace(step.PAPER, batch_size=n) for n in (16, 8, 4, 2)])
    step.run(replace(context, rehearse=False))
    assert [engine for _, engine in calls[:2]] == ["ZeRO-3", "plain PyTorch"]
    assert calls[2:] == [(16, "ZeRO-3"), (8, "ZeRO-3"), (4, "ZeRO-3")]


TWO_ENGINES = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from gpu_stages import step
from gpu_stages.context import StageContext

context = StageContext.of("step", rehearse=True, out=Path(sys.argv[1]), seconds=300)
measure_variant, calls = step._measure_variant, []

def measure(*arguments):
    calls.append(1)
    if len(calls) == 1:
        raise torch.OutOfMemoryError("no room")
    measure_variant(*arguments)

step._measure_variant = measure
assert not step._measure_if_it_fits(context, step.TOY, ["ZeRO-3"])
step._free_memory()
assert step._measure_if_it_fits(context, replace(step.TOY, batch_size=1), ["ZeRO-3"])
"""


@pytest.mark.slow
def test_a_second_engine_starts_where_a_first_one_ran_out_of_memory(tmp_path: Path) -> None:
    folders = (ROOT, ROOT / "kernels", ROOT / "kernels" / "benchmarks", ROOT / "tools")
    path = os.pathsep.join(map(str, folders))
    result = _python("-c", TWO_ENGINES, str(tmp_path), PYTHONPATH=path, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    rows = _rows(tmp_path)
    assert {row["variant"] for row in rows if row["metric"] == "step time"} == set(VARIANTS)


def _step_stage(out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, Any]:
    """The module of the stage, and its context for a rehearsal without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    context = importlib.import_module("gpu_stages.context").StageContext.of("step", rehearse=True, out=out, seconds=60)
    return importlib.import_module("gpu_stages.step"), context


def test_the_ceilings_of_another_gpu_are_not_used(
    tools: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    contexts = []
    for gpu in ("NVIDIA A100", "NVIDIA H200"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda gpu=gpu: gpu)
        stages = importlib.import_module("gpu_stages.context")
        contexts.append(stages.StageContext.of("step", rehearse=True, out=tmp_path, seconds=60))
    measured = contexts[0].measure_ceilings()
    assert contexts[0].ceilings() == measured
    assert contexts[1].ceilings() is None


def test_a_later_run_replaces_the_rows_of_its_stages_alone(tools: ModuleType, tmp_path: Path) -> None:
    summary, rows = importlib.import_module("gpu_stages.summary"), importlib.import_module("rows")
    path = tmp_path / "cpu.csv"
    file = rows.RowFile(path, "x")
    file.append([rows.Row(stage=stage, subject="one") for stage in ("step", "fast", "step")])
    summary.drop_stages(path, ["step"])
    assert [row["stage"] for row in summary.read_rows(path)] == ["fast"]
    summary.drop_stages(path, ["fast"])
    assert not path.exists() and summary.summarize([]) == "not measured\n"


@pytest.mark.parametrize(
    ("kernel", "family"),
    [
        ("norm_forward_kernel", "norms"),
        ("forward_kernel", "attention"),
        ("swiglu_backward_kernel", "SwiGLU"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32", "products"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("void at::native::index_elementwise_kernel<128, 4>", "by index"),
        ("ncclDevKernel_AllGather_RING_LL", "collectives"),
        ("Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>", "other"),
    ],
)
def test_kernels_are_put_into_families_by_their_names(tools: ModuleType, kernel: str, family: str) -> None:
    assert importlib.import_module("gpu_stages.step").family_of(kernel) == family


def test_a_smaller_gpu_gets_a_smaller_step(tools: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    step = importlib.import_module("gpu_stages.step")

    def sizes(gib: float) -> list[Any]:
        monkeypatch.setattr(step, "free_memory_bytes", lambda _: gib * 2**30)
        return step._sizes_that_fit("cuda")

    assert sizes(139)[0] == step.PAPER
    assert sizes(78)[0] != step.PAPER and step.estimated_bytes(sizes(78)[0]) < 78 * 2**30
    assert sizes(2) == []
    # Only the paper's models: weights, float32 master weights, gradients and moments, and the decoder.
    assert step.estimated_bytes(step.PAPER) > 20 * 3.0e9 + 2 * 8.0e9


def test_the_readme_shows_the_summary_of_the_measured_folder(tools: ModuleType) -> None:
    text = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    assert tools.with_measured(text) == text, "run python tools/gpu_day.py --readme"
    other = text.replace("for lack of a GPU", "")
    assert other != text and tools.with_measured(other) == text


@pytest.mark.parametrize(
    ("code", "text", "word"), [(1, "ImportError: no such module", "ended early"), (0, None, "right")]
)
def test_a_check_that_ends_without_its_verdicts_is_bad(
    tools: ModuleType, tmp_path: Path, code: int, text: str | None, word: str
) -> None:
    right = importlib.import_module("gpu_stages.right")
    context = importlib.import_module("gpu_stages.context").StageContext.of(
        "right", rehearse=True, out=tmp_path, seconds=9.0
    )
    (tmp_path / "words").write_text(text or "result: splice R=1: right")
    process = SimpleNamespace(returncode=code)
    right._report_check(context, right._Check(kernel="splice", num_cases=1, process=process, words=tmp_path / "words"))
    (row,) = _rows(tmp_path)
    assert row["value"] == word and tools.is_bad(row["value"]) == (code == 1)

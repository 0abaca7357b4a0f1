"""The benchmark runner, without a GPU: no time counts on a wrong result, and no figure is made up."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import arc_kernels as ak

pytest.importorskip("triton")

BENCHMARKS = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The runner; its clock and its memory meter call the function once and give fixed figures."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("bench_kernels")
    monkeypatch.setattr(module, "median_ms", lambda function: (function(), 2.0)[1])
    monkeypatch.setattr(module, "peak_extra_bytes", lambda function: (function(), 3 << 20)[1])
    return module


def _case(bench: ModuleType, kernel: str, rows: int = 8) -> Any:
    tiny = replace(bench.TINY, rows=rows, labels=4, vocab_size=64, lengths=(3, 5))
    return next(case for case in (*bench.cases(tiny), *bench.attention_cases(tiny)) if case.kernel == kernel)


def test_without_a_gpu_nothing_is_measured_and_make_bench_goes_on(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--csv", str(tmp_path / "rows.csv")]) == 0
    assert "nothing measured" in capsys.readouterr().out
    assert not (tmp_path / "rows.csv").exists()


def test_an_unknown_kernel_is_named(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--kernel", "no_such"]) == 2
    assert "no_such" in capsys.readouterr().err


def test_a_wrong_kernel_is_found_before_it_is_timed(bench: ModuleType, device: torch.device) -> None:
    checks = importlib.import_module("gpu_checks")
    case = _case(bench, "swiglu")

    def wrong(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
        y = ak.swiglu(gate_TF, up_TF)
        return y * 1.02 if ak._dispatch._forced == "triton" else y

    assert checks.check_case(case, device) == []
    findings = checks.check_case(replace(case, function=wrong), device)
    assert any(finding.startswith("output 0") for finding in findings), findings
    assert any(finding.startswith("gradient of gate_TF") for finding in findings), findings


def test_a_baseline_that_computes_something_else_or_fails_has_no_row(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(**_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not on this GPU")

    def right(x_TD: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
        return ak.rms_norm(x_TD, weight_D, eps=1e-5)

    baselines = {"right": right, "other": lambda **inputs: 2 * right(**inputs), "fails": fails}
    rows = _time(bench, replace(_case(bench, "rms_norm"), baselines=baselines), monkeypatch)
    assert [row.implementation for row in rows[::3]] == ["arc_kernels", "torch eager", "torch.compile", "right"]
    printed = capsys.readouterr().out
    assert "other: left out" in printed and "not on this GPU" in printed


def test_rates_are_floors_over_times(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward, both = _time(bench, _case(bench, "rms_norm"), monkeypatch)[:3]
    moved = 8 * 3072 * 2  # one tensor, bfloat16
    assert [row.mode for row in (forward, backward, both)] == ["forward", "backward", "both"]
    assert forward.gb_per_s == round(2 * moved / 2e-3 / 1e9, 1)
    assert both.share_of_copy == round(5 * moved / 2e-3 / 1e6, 3)  # the copy moves 1 MB/s here
    assert (forward.tflops, forward.peak_extra_mib, forward.times_ours) == ("", 3.0, 1.0)


@pytest.mark.parametrize(("name", "pairs"), [("encoder", 9 + 25), ("pooled", 3 + 5), ("decoder", 6 + 15)])
def test_attention_counts_the_pairs_that_are_seen(bench: ModuleType, name: str, pairs: int) -> None:
    tiny = replace(bench.TINY, lengths=(3, 5))
    case = next(case for case in bench.attention_cases(tiny) if case.shape.startswith(name))
    num_heads = 32 if name == "decoder" else 24
    assert case.floor.forward_flops == 4 * 128 * num_heads * pairs
    assert case.floor.backward_flops == 10 * 128 * num_heads * pairs


def test_flex_attention_gets_the_mask_of_the_segments(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = importlib.import_module("gpu_attention")
    checks = importlib.import_module("gpu_checks")
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)
    cases = bench.attention_cases(replace(bench.TINY, lengths=(3, 5)))
    for case in (case for case in cases if case.kernel == "attention"):
        inputs = case.inputs(CPU)  # without gradients, which FlexAttention has on a GPU only
        with ak.use("reference"):
            assert checks.same_result(case.baselines["FlexAttention"](**inputs), case.function(**inputs)), case.shape


def test_rows_are_appended_with_where_they_come_from(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    path = tmp_path / "rows.csv"
    rows = _time(bench, _case(bench, "swiglu"), monkeypatch)
    bench._append(path, rows)
    bench._append(path, rows)
    with path.open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * len(rows)
    assert {line["gpu"] for line in lines} == {"a GPU"}
    assert all(line["date"] and line["torch"] and line["triton"] and line["commit"] for line in lines)
    assert all("bench_kernels.py" in line["command"] for line in lines)


def _time(bench: ModuleType, case: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Rows of a case on the CPU, "compiled" by nothing, against a copy of 1 MB a second."""

    def uncompiled(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        return function

    monkeypatch.setattr(torch, "compile", uncompiled)
    monkeypatch.setattr(bench, "_ours", lambda case: bench._under("reference", case.function))
    return bench._time_case(case, CPU, 1e6)

"""The benchmark runner without a GPU: wrong results are not timed, and every number is measured."""

from __future__ import annotations

import csv
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import arc_kernels as ak
from tests.kernels.programs import benchmark

bench, checks, timing = map(benchmark, ("bench_kernels", "gpu_checks", "gpu_timing"))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fake_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner's clock calls each function once and reports 2 ms for the first, 4 ms for the second, and so on."""

    def interleaved(functions: list[Callable[[], Any]], *_: Any, **__: Any) -> list[Any]:
        for function in functions:
            function()
        return [timing.Timing(2.0 * (1 + i), 0.25, 7) for i in range(len(functions))]

    monkeypatch.setattr(bench, "interleaved", interleaved)


def _case(kernel: str, rows: int = 8) -> Any:
    tiny = replace(bench.TINY, rows=rows, labels=4, vocab_size=64, lengths=((3, 5),))
    return next(case for case in (*bench.cases(tiny), *bench.attention_cases(tiny)) if case.kernel == kernel)


def test_without_a_gpu_nothing_is_measured_and_make_bench_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--csv", str(tmp_path / "rows.csv")]) == 0
    assert "nothing measured" in capsys.readouterr().out
    assert not (tmp_path / "rows.csv").exists()


@pytest.mark.parametrize("option", ["--kernel", "--shape"])
def test_an_unknown_kernel_or_shape_is_named(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([option, "no_such", "--check"]) == 2
    assert "no_such" in capsys.readouterr().err


def test_a_wrong_kernel_is_found_before_it_is_timed(device: torch.device) -> None:
    case = _case("swiglu")

    def wrong(gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
        y = ak.swiglu(gate_TF, up_TF)
        return y * 1.02 if ak._dispatch._forced == "triton" else y

    assert checks.check_case(case, device) == []
    findings = checks.check_case(replace(case, function=wrong), device)
    assert any(finding.startswith("output 0") for finding in findings), findings
    assert any(finding.startswith("gradient of gate_TF") for finding in findings), findings


def test_a_baseline_that_computes_something_else_or_fails_is_a_row_that_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(**_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not on this GPU")

    def right(x_TD: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
        return ak.rms_norm(x_TD, weight_D, eps=1e-5)

    def without_gradient(x_TD: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
        return right(x_TD.detach(), weight_D.detach())

    baselines = {
        "right": right,
        "other": lambda **inputs: 2 * right(**inputs),
        "fails": fails,
        "half": without_gradient,
    }
    rows = _time(replace(_case("rms_norm"), baselines=baselines), monkeypatch)
    timed = [row.variant for row in rows if row.metric == "both"]
    assert timed == ["arc_kernels", "torch eager", "torch.compile", "right"]
    notes = {(row.variant, row.value): row.note for row in rows if row.metric == "result"}
    assert "something else" in notes["other", "left out"] and "not on this GPU" in notes["fails", "left out"]
    assert "backward" in notes["half", "left out"] or "both" in notes["half", "left out"]


def test_a_baseline_that_writes_over_its_inputs_spoils_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[float]] = {"before": [], "after": []}

    class WritesOverGate(torch.autograd.Function):  # as Liger's SwiGLU does
        @staticmethod
        def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(gate, up)
            return torch.nn.functional.silu(gate) * up

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            gate, up = (x.data for x in ctx.saved_tensors)
            return gate.fill_(1e6), up.fill_(1e6)

    def watches(name: str, gate_TF: torch.Tensor, up_TF: torch.Tensor) -> torch.Tensor:
        seen[name].append(float(gate_TF.detach().abs().max()))
        return ak.swiglu(gate_TF, up_TF)

    baselines = {
        "before": partial(watches, "before"),
        "overwriting": lambda gate_TF, up_TF: WritesOverGate.apply(gate_TF, up_TF),
        "after": partial(watches, "after"),
    }
    rows = _time(replace(_case("swiglu"), baselines=baselines), monkeypatch)
    assert [row.variant for row in rows if row.metric == "backward"][-2:] == ["overwriting", "after"]
    assert len(set(seen["before"] + seen["after"])) == 1, "all see the same inputs at every call"


def test_a_compiled_backward_can_be_repeated_after_one_that_was_not(monkeypatch: pytest.MonkeyPatch) -> None:
    # As after the stage "right", which compiles forward and backward together and leaves both in the cache.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    case = _case("rms_norm")
    reasons = []
    for kept in (bench._graphs_can_be_kept(), nullcontext()):
        torch.compiler.reset()
        inputs, functions = bench.leaves_of(case, CPU), dict(bench._implementations(case, compiles=True))
        with kept:
            bench.runner_of(functions["torch.compile"], inputs, case.wants_grad, "both")()
            reasons.append(
                bench._cannot_run(bench.runner_of(functions["torch.compile"], inputs, case.wants_grad, "backward"))
            )
    assert reasons[0] == "" and "donated" in reasons[1]


def test_what_has_to_be_compiled_is_left_out_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(_case("rms_norm"), compiled_baselines=frozenset({"F.rms_norm"}))
    rows = _time(case, monkeypatch, compiles=False)
    assert {row.variant for row in rows} == {"arc_kernels", "torch eager"}


def test_rates_are_floors_over_times(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row for row in _time(_case("rms_norm"), monkeypatch) if row.variant == "arc_kernels"]
    moved = 8 * 3072 * 2  # one tensor, bfloat16
    assert [row.metric for row in rows] == ["forward", "backward", "both"]
    assert [row.value for row in rows] == [2.0] * 3 and rows[0].spread == 0.25
    assert rows[2].share == round(5 * moved / 2e-3 / 1e6, 3)  # the copy moves 1 MB/s here
    assert f"{5 * moved / 2e-3 / 1e9:.1f} GB/s" in rows[2].note


def test_times_of_others_are_given_as_multiples_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = _time(_case("rms_norm"), monkeypatch)
    assert [row.ratio for row in rows if row.metric == "both"] == [1.0, 2.0, 3.0, 4.0]


def test_matrix_kernels_are_compared_with_the_matrix_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    row = next(row for row in _time(_case("linear_cross_entropy"), monkeypatch) if row.metric == "both")
    assert row.share == round(2 * 2 * 4 * 3072 * 64 / 2e-3 / 1e9, 3)  # products run at 1 GFLOP/s here


def test_the_first_case_of_each_kernel_comes_before_any_second_one() -> None:
    kernels = [case.kernel for case in bench.all_cases(bench.FULL)]
    num_kernels = len(set(kernels))
    assert len(set(kernels[:num_kernels])) == num_kernels < len(kernels)


def test_all_functions_are_timed_in_turn_and_the_median_is_robust(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = iter([0.0, 0.0] * 5 + [2e-3, 5e-3] * 4 + [900e-3, 5e-3])
    calls: list[str] = []
    clock = {"t": 0.0}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock["t"])

    def call(name: str) -> None:
        calls.append(name)
        clock["t"] += next(durations)

    fast, slow = timing.interleaved([lambda: call("a"), lambda: call("b")], CPU, budget_ms=1e-9)
    assert calls == ["a", "b"] * 10  # two rounds of warm-up, three that estimate, five that count
    assert fast.median_ms == pytest.approx(2.0) and slow.median_ms == pytest.approx(5.0)
    assert slow.spread_ms == pytest.approx(0.0) and fast.rounds == 5


def test_the_gpu_waits_longer_than_the_host_takes_to_queue_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"t": 0.0}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock["t"])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    durations = {"quick": iter([3.0, 2e-4, 1e-4]), "waiting": iter([3.0, 0.5, 0.5])}  # the first call compiles

    def call(name: str) -> None:
        clock["t"] += next(durations[name])

    quick, waiting = timing._head_starts([lambda: call("quick"), lambda: call("waiting")])
    assert 1e-4 < quick / timing.CYCLES_PER_MS / 1e3 < 5e-4
    assert waiting == timing.MAX_HEAD_START_MS * timing.CYCLES_PER_MS


@pytest.mark.parametrize(
    ("name", "pairs"), [("encoder", 9 + 25), ("pooled", 3 + 5), ("decoder", 6 + 15), ("window", 6 + 14)]
)
def test_attention_counts_the_pairs_that_are_seen(name: str, pairs: int) -> None:
    tiny = replace(bench.TINY, lengths=((3, 5),))
    case = next(case for case in bench.attention_cases(tiny) if case.shape.startswith(name))
    num_heads = 32 if name in ("decoder", "window") else 24
    assert case.floor.forward_flops == 4 * 128 * num_heads * pairs
    assert case.floor.backward_flops == 10 * 128 * num_heads * pairs


def test_flex_attention_gets_the_mask_of_the_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = benchmark("gpu_attention")
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)
    cases = bench.attention_cases(replace(bench.TINY, lengths=((3, 5),)))
    for case in (case for case in cases if case.kernel == "attention"):
        inputs = case.inputs(CPU)  # no gradients: FlexAttention has them only on a GPU
        with ak.use("reference"):
            assert checks.same_result(case.baselines["FlexAttention"](**inputs), case.function(**inputs)), case.shape


def test_rows_are_appended_with_where_they_come_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    path = tmp_path / "new" / "rows.csv"
    file = bench.RowFile(path, "bench_kernels.py")
    rows = [bench.Row(stage="fast", subject="norm", value=1.5), bench.Row(stage="fast", subject="swiglu", note="a, b")]
    file.append(rows)
    file.append(rows)
    with path.open() as opened:
        lines = list(csv.DictReader(opened))
    assert [line["subject"] for line in lines] == ["norm", "swiglu"] * 2 and lines[1]["note"] == "a, b"
    assert {line["gpu"] for line in lines} == {"a GPU"}
    assert all(line["date"] and line["torch"] and line["triton"] and line["commit"] for line in lines)
    assert all("bench_kernels.py" in line["command"] for line in lines)
    assert bench.file_name("NVIDIA H200") == "nvidia_h200"


def _time(case: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Any]:
    """Rows of a case on the CPU with a no-op compiler, on a device that copies 1 MB/s and multiplies at 1 GFLOP/s."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(bench, "check_case", lambda *_: [])
    monkeypatch.setattr(bench, "_ours", lambda case: bench._under("reference", case.function))
    return bench.measure_case(case, CPU, bench.Ceilings(copy=1e6, matrix=1e9), **options)

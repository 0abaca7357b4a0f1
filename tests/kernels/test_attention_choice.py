"""The choice of attention: explicit settings first, then measurements, and never a backend that cannot run the call."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import arc_kernels as ak
from arc_kernels.attention import choice
from arc_kernels.attention.measured import Measured
from arc_kernels.attention.segments import Segments
from tests.kernels.programs import benchmark

Q = torch.zeros(4, 2, 64, dtype=torch.bfloat16)
CU = torch.tensor([0, 4], dtype=torch.int32)


def _row(max_seqlen: int, ratio: float, *, gpu: str = "G", head_dim: int = 64, causal: bool = False) -> Measured:
    return Measured(gpu, "bfloat16", head_dim, causal, max_seqlen, max_seqlen, ratio)


def _chosen(**changes: Any) -> str:
    segments = Segments(CU, CU, None, max_seqlen_q=300, max_seqlen_k=300, causal=False, scale=1.0)
    return choice.chosen_backend(Q, segments._replace(**changes))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose GPU "G" supports both backends, with measurements that favour each of them at some length."""
    monkeypatch.setattr(choice, "flash_serves", lambda q, limits: limits is None)
    monkeypatch.setattr(choice, "use_triton", lambda q: choice.choice_in_force() != "reference")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name="G"))
    table = (
        _row(256, 1.2),
        _row(4096, 0.8),
        _row(256, 0.5, gpu="H"),
        _row(256, 0.5, head_dim=128),
        _row(256, 0.5, causal=True),
    )
    monkeypatch.setattr(choice, "MEASURED", table)


@pytest.mark.usefixtures("gpu")
def test_auto_takes_what_was_faster_at_the_nearest_lengths_of_this_gpu_head_size_and_mask() -> None:
    assert _chosen() == "triton"
    assert _chosen(max_seqlen_q=3000, max_seqlen_k=3000) == "flash"
    assert _chosen(causal=True) == "flash"
    assert _chosen(causal=True, window=100) == "triton", "no row was measured with a window"
    limits = torch.ones(4, dtype=torch.int32)
    found = _chosen(k_limits_T=limits, max_seqlen_q=4096, max_seqlen_k=4096)
    assert found == "triton", "FlashAttention cannot serve limits"


@pytest.mark.usefixtures("gpu")
def test_a_choice_of_kernels_is_not_overruled_by_the_table() -> None:
    for forced in ("triton", "reference"):
        with ak.use(forced):  # type: ignore[arg-type]
            assert _chosen(max_seqlen_q=4096, max_seqlen_k=4096) == forced


def test_a_gpu_without_rows_takes_ours_and_equal_speed_is_not_enough() -> None:
    assert not choice.flash_was_faster([], max_seqlen_q=9, max_seqlen_k=9)
    assert not choice.flash_was_faster([_row(64, 0.96)], max_seqlen_q=64, max_seqlen_k=64)
    assert choice.flash_was_faster([_row(64, 0.94)], max_seqlen_q=64, max_seqlen_k=64)


def test_flash_is_taken_where_it_serves_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARC_ATTENTION", "flash")
    with ak.use("reference"):
        assert _chosen() == "reference", "there is no FlashAttention on the CPU"
        monkeypatch.setattr(choice, "flash_serves", lambda q, limits: True)
        assert _chosen() == "flash"
        with ak.use_attention("reference"):
            assert _chosen() == "reference"


def test_an_unknown_choice_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "choice is 'fast'; expected one of auto, triton, flash"
    with pytest.raises(ValueError, match=expected), ak.use_attention("fast"):  # type: ignore[arg-type]
        pass
    monkeypatch.setenv("ARC_ATTENTION", "sdpa")
    with pytest.raises(ValueError, match="ARC_ATTENTION is 'sdpa'"):
        _chosen()


def test_triton_without_a_gpu_or_the_interpreter_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with ak.use_attention("triton"), pytest.raises(ValueError, match="Triton kernels were requested"):
        _chosen()


def test_the_table_is_written_so_that_it_reads_back(tmp_path: Path) -> None:
    program = benchmark("choose_attention")
    path = tmp_path / "measured.py"
    path.write_text(program.TABLE.read_text(encoding="utf-8"), encoding="utf-8")
    for rows in ([_row(4096, 0.8), _row(256, 1.2)], []):
        program.write_table(path, rows)
        table = runpy.run_path(str(path))["MEASURED"]
        assert [tuple(row) for row in table] == sorted(tuple(row) for row in rows)


def test_a_table_that_runs_out_of_time_holds_what_is_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = benchmark("choose_attention")
    clock = iter([0.0, 1.0, 2.0, *[9.0] * 99])
    monkeypatch.setattr(program.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "G")
    monkeypatch.setattr(program, "_measure", lambda layer: _row(max(layer.keys), 1.5, head_dim=layer.head_dim))
    table, before = tmp_path / "measured.py", program.TABLE.read_text(encoding="utf-8")
    table.write_text(before, encoding="utf-8")
    assert program.main(["--write", f"--table={table}", "--seconds=5"]) == 0
    assert table.read_text(encoding="utf-8").count("flash_over_ours=1.5") == 2
    assert program.TABLE.read_text(encoding="utf-8") == before

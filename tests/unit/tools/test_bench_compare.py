"""The synthetic runs of the benchmark are runs that `compare` reads."""

from __future__ import annotations

from pathlib import Path

from bench_compare import write_folders

from arc_ds.comparison.folders import find_run_folders, read_run_folder
from arc_ds.comparison.report import Options, compare_runs


def test_synthetic_runs_are_a_sweep_with_seeds(tmp_path: Path) -> None:
    write_folders(tmp_path / "runs", 7, 200, 20)
    comparison = compare_runs([read_run_folder(each) for each in find_run_folders(tmp_path / "runs")], Options())
    assert sorted(len(group.members) for group in comparison.groups) == [1, 3, 3]
    assert len(comparison.metrics) == 20 and all(run.last_step == 200 for run in comparison.runs)

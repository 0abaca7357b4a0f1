"""`arc-ds compare` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arc_ds.cli import main
from tests.helpers.compared_runs import falling, write_run


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs with another learning rate."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    for name, rate, start in (("low", 1e-4, 9.0), ("high", 1e-3, 5.0)):
        write_run(
            tmp_path / "runs" / name, {"train/loss": falling(start)}, {"optimizer": {"encoder_lr": rate}, "seed": 0}
        )
    return tmp_path / "runs"


def test_two_runs_are_told_apart_in_one_command(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs / "low"), str(runs / "high"), "--out", "page"]) == 0
    text = capsys.readouterr().out
    assert "optimizer.encoder_lr  0.001  0.0001" in text
    assert "high, best value 1.027. Next: low, best value 1.054, which is 0.02695 worse. Seeds alone may" in text
    assert "wrote page/comparison.html" in text and Path("page/comparison.html").is_file()


def test_json_is_all_of_standard_output(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs), "--json", "--at", "50", "--out", "page"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["at_step"] == 50 and [run["name"] for run in found["runs"]] == ["high", "low"]
    assert found["runs"][0]["differences"] == {"optimizer.encoder_lr": "0.001"}
    assert found["runs"][0]["metrics"]["train/loss"]["at"] == {"step": 50, "value": falling(5.0)[50]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to compare. Give runs, or --experiment NAME"),
        (["runs", "--best", "train/los"], "no run has the metric 'train/los'. Nearest of the 1 metrics: train/loss"),
        (["runs", "--metrics", "eval/*"], "no run has the metric 'eval/*'"),
        (["runs", "--x", "tokens"], "--x tokens needs the metrics speed/encoder_tokens_per_s"),
        (["runs", "--at", "-1"], "--at is -1; expected a step from 0 on"),
        (["gone"], "no folder 'gone' exists here, and no MLflow store was found"),
        (["runs/low", "--log-to", "runs/low"], "records no MLflow run"),
    ],
)
def test_mistakes_are_named(runs: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err

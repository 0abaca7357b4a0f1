"""Result folders in a comparison of runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arc_ds.cli import main
from arc_ds.comparison.evaluation import is_result_folder, paired_table
from arc_ds.errors import DataError
from arc_ds.pages.tables import to_csv
from tests.helpers.compared_runs import write_run

pytest.importorskip("arc_ds.evaluation.comparison")


def write_results(folder: Path, name: str, num_right: int) -> Path:
    """Answers of a system to 100 questions, the first ones right."""
    (folder / name).mkdir()
    lines = [
        {
            "id": str(idx),
            "task": "squad",
            "system": name,
            "prediction": "Paris" if idx < num_right else "Rome",
            "references": ["Paris"],
        }
        for idx in range(100)
    ]
    (folder / name / "predictions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder / name


def test_systems_are_compared_in_pairs_with_intervals_and_p_values(tmp_path: Path) -> None:
    folders = [write_results(tmp_path, "weak", 40), write_results(tmp_path, "strong", 60)]
    assert all(map(is_result_folder, folders)) and not is_result_folder(tmp_path)
    table = paired_table(folders)
    row = dict(zip(table.columns, next(row for row in table.rows if row[2].text == "em"), strict=True))
    assert row["system"].text == "strong" and row["weak"].value == 40 and row["score"].value == 60
    assert row["difference"].value == 20 and row["n"].value == 100
    assert row["test"].text == "mcnemar" and row["p"].value == pytest.approx(2 / 2**20)
    one = [json.loads(line) for line in (folders[0] / "predictions.jsonl").read_text().splitlines()]
    for folder in folders:
        (folder / "predictions.jsonl").write_text("".join(json.dumps({**line, "cluster": "c"}) + "\n" for line in one))
    assert "nan" not in to_csv(paired_table(folders)), "one cluster has no interval"


def test_one_system_has_no_pair(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds the results of one system, weak; a paired test needs two"):
        paired_table([write_results(tmp_path, "weak", 40)])


def test_runs_and_results_share_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [write_results(tmp_path, "weak", 40), write_results(tmp_path, "strong", 60)]
    write_run(tmp_path / "run", {"train/loss": {1: 1.0}}, {})
    assert main(["compare", "run", *map(str, folders), "--out", "page"]) == 0
    assert "Paired differences from weak" in capsys.readouterr().out
    assert "Paired differences from weak" in Path("page/comparison.html").read_text()
    assert Path("page/paired.csv").is_file()
    assert main(["compare", "run", *map(str, folders), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["paired"]
    assert [(each["system"], each["difference"]) for each in found if each["metric"] == "em"] == [("strong", 20)]

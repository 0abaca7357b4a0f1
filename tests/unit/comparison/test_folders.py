"""Runs in folders, and files with faults."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from arc_ds.comparison.folders import find_run_folders, read_run_folder
from arc_ds.comparison.runs import with_unique_names
from arc_ds.errors import DataError
from arc_ds.system.locks import writing
from tests.helpers.compared_runs import lines_of, write_run

POINTS = {"train/loss": {1: 3.0, 2: 2.0, 3: 1.0}, "validation/seconds": {2: 0.5}}


def test_a_run_has_its_flat_config_and_its_points(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "a", POINTS, {"optimizer": {"encoder_lr": 0.001, "betas": [0.9, 0.95]}, "pooling": None}
    )
    run = read_run_folder(folder)
    assert run.config["optimizer.encoder_lr"] == "0.001" and run.config["optimizer.betas"] == "[0.9, 0.95]"
    assert run.config["pooling"] == "null"
    assert run.curves["train/loss"].steps.tolist() == [1, 2, 3] and run.curves[
        "validation/seconds"
    ].values.tolist() == [0.5]
    assert run.last_step == 3 and run.notes == ()


def test_facts_give_deepspeed_digests_and_tags(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", POINTS, {"deepspeed": "gone.json"})
    facts = {
        "tags": {"host": "n1", "mlflow.source.git.commit": "abc"},
        "datasets": {"train": "d" * 64},
        "deepspeed": {"zero_optimization": {"stage": 3}},
    }
    (folder / "facts.json").write_text(json.dumps(facts))
    run = read_run_folder(folder)
    assert run.config["deepspeed.zero_optimization.stage"] == "3" and "deepspeed" not in run.config
    assert run.config["digest.train"] == "d" * 36  # as in MLflow
    assert run.facts == {"status": "STOPPED", "host": "n1", "commit": "abc"}


def test_digests_of_all_inputs_are_part_of_the_config(tmp_path: Path) -> None:
    """Two folders `train` share a key, and neither of their digests is lost."""
    folder = write_run(tmp_path / "a", POINTS, {})
    facts = {
        "tags": {"digest.encoder.backbone": "b" * 36},
        "datasets": {"/wiki/train": "2" * 40, "/books/train": "1" * 40},
        "held_out": "h" * 64,
    }
    (folder / "facts.json").write_text(json.dumps(facts))
    run = read_run_folder(folder)
    digests = {key: value for key, value in run.config.items() if key.startswith("digest")}
    assert digests == {
        "digest.train": "1" * 36 + " + " + "2" * 36,
        "digest.held-out": "h" * 36,
        "digest.encoder.backbone": "b" * 36,
    }
    assert run.facts == {"status": "STOPPED"}
    (folder / "facts.json").write_text('{"tags": [1], "datasets": "x", "held_out": 3}')
    assert read_run_folder(folder).facts == {"status": "STOPPED"}


def test_the_status_of_a_folder_is_that_of_its_process(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", POINTS, {"steps": 3})
    assert read_run_folder(folder).facts["status"] == "FINISHED"
    (folder / "lock").write_text(f"process 1 on {socket.gethostname()}")
    run = read_run_folder(folder)
    assert run.facts["status"] == "DEAD" and run.notes[0].startswith("It was killed or lost: no process of it is left.")
    with writing(folder, "run"):
        assert read_run_folder(folder).facts["status"] == "RUNNING"


def test_without_facts_the_file_of_deepspeed_is_read(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    folder = write_run(tmp_path / "a", POINTS, {"deepspeed": str(tmp_path / "ds.json")})
    assert read_run_folder(folder).config["deepspeed.zero_optimization.stage"] == "2"


def test_a_torn_last_line_is_left_out_without_a_note(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", POINTS, {})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "time": 1.0, "metr')
    run = read_run_folder(folder)
    assert run.last_step == 3 and run.notes == ()


def test_damage_in_the_middle_is_noted_with_the_lines_that_are_lost(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", POINTS, {})
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "\0\0\n" + lines[1] + lines[2])
    run = read_run_folder(folder)
    assert run.last_step == 1
    assert "damaged at byte" in run.notes[0] and "3 later line(s)" in run.notes[0]
    for other in (
        '{"step": 1, "loss": 2.0}',
        '{"step": "1", "time": 1.0, "metrics": {}}',
        '{"step": 1, "time": 1.0, "metrics": {"loss": null}}',
        '{"step": 1, "time": 1.0, "metrics": [1]}',
    ):
        path.write_text(f"{other}\n")
        without, damaged = read_run_folder(folder).notes
        assert without == "It has no metrics." and "at byte 0; 1 later line(s)" in damaged


def test_a_repeated_step_counts_once_with_its_last_value(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", POINTS, {})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("".join(f"{line}\n" for line in lines_of({"train/loss": {2: 20.0, 3: 10.0, 4: 5.0}}, (2, 3, 4))))
    curve = read_run_folder(folder).curves["train/loss"]
    assert curve.steps.tolist() == [1, 2, 3, 4] and curve.values.tolist() == [3.0, 20.0, 10.0, 5.0]


def test_a_run_without_metrics_is_a_run_with_a_note(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", {}, {"steps": 5})
    (folder / "metrics.jsonl").unlink()
    assert find_run_folders(folder) == [folder]
    run = read_run_folder(folder)
    assert run.curves == {} and run.last_step == 0 and run.notes == ("It has no metrics.",)


def test_a_folder_of_runs_gives_all_of_them(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_run(tmp_path / name, POINTS, {})
    (tmp_path / "mlartifacts").mkdir()
    assert [path.name for path in find_run_folders(tmp_path)] == ["a", "b"]


def test_a_folder_without_runs_names_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    with pytest.raises(DataError, match=r"is no run and holds none.*metrics\.jsonl; found shards\. Give the run_dir"):
        find_run_folders(tmp_path)


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", POINTS, {})
    (folder / "config.yaml").write_text("a: [1")
    with pytest.raises(DataError, match=r"a/config\.yaml is not valid YAML"):
        read_run_folder(folder)


def test_runs_of_one_name_get_different_labels() -> None:
    assert with_unique_names([("run", "/x/one/run"), ("run", "/x/two/run"), ("b", "id")]) == ["one/run", "two/run", "b"]
    assert with_unique_names([("r", "0123456789"), ("r", "abcdefghij")]) == ["r (01234567)", "r (abcdefgh)"]
    assert with_unique_names([("r", "/a/x/r"), ("r", "/b/x/r")]) == ["r (/a/x/r)", "r (/b/x/r)"]

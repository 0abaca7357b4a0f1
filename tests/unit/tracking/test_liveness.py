"""Signs of life of runs, from the locks of their folders."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest

from arc_ds.system.locks import writing
from arc_ds.tracking.liveness import life_of, life_of_run

HERE = socket.gethostname()


@pytest.mark.parametrize(
    ("holder", "age_s", "status", "is_here"),
    [
        (HERE, 0, "DEAD", True),
        (HERE, 9999, "DEAD", True),
        ("elsewhere", 0, "RUNNING", False),
        ("elsewhere", 500, "RUNNING", False),
        ("elsewhere", 700, "SILENT", False),
    ],
)
def test_a_lock_without_holder_is_certain_on_its_host_only(
    tmp_path: Path, holder: str, age_s: float, status: str, is_here: bool
) -> None:
    (tmp_path / "lock").write_text(f"process 7 on {holder}")
    (tmp_path / "metrics.jsonl").touch()
    seen = time.time() - age_s
    for name in ("lock", "metrics.jsonl"):
        os.utime(tmp_path / name, (seen, seen))
    assert life_of(tmp_path) == (status, is_here, pytest.approx(seen))


def test_a_held_lock_is_a_running_run_however_silent_and_the_look_leaves_it(tmp_path: Path) -> None:
    with writing(tmp_path, "run"):
        os.utime(tmp_path / "lock", (1, 1))
        assert life_of(tmp_path).status == "RUNNING"
    with writing(tmp_path, "run"):  # a start right after a look
        pass


@pytest.mark.parametrize(("host", "is_here"), [(HERE, True), ("elsewhere", False)])
def test_an_orderly_end_leaves_no_lock(tmp_path: Path, host: str, is_here: bool) -> None:
    (tmp_path / "facts.json").write_text(json.dumps({"tags": {"host": host}}))
    assert life_of(tmp_path)[:2] == ("STOPPED", is_here)


def test_metrics_of_hosts_are_signs_of_life(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("process 7 on elsewhere")
    os.utime(tmp_path / "lock", (1, 1))
    assert life_of(tmp_path).status == "SILENT"
    (tmp_path / "system_metrics").mkdir()
    (tmp_path / "system_metrics" / "elsewhere.jsonl").touch()
    assert life_of(tmp_path).status == "RUNNING"


def test_a_folder_tells_of_its_own_mlflow_run_only_also_if_it_moved_with_the_store(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tracking_state.json").write_text(json.dumps({"run_id": "mine"}))
    assert life_of_run("mine", str(tmp_path / "run"), None) is not None
    assert life_of_run("mine", "/former/place/run", tmp_path / "mlflow.db") is not None
    assert life_of_run("mine", "/former/place/run", None) is None
    assert life_of_run("other", str(tmp_path / "run"), tmp_path / "mlflow.db") is None

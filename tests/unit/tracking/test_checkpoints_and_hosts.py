"""A tracker that also sends checkpoints as models, and the load of hosts; with the in-memory server."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arc_ds.tracking import system_metrics, tracking
from arc_ds.tracking.metrics_log import MetricsLog, read_metrics, read_step
from arc_ds.tracking.system_metrics import SYSTEM_FOLDER, SystemMetrics
from arc_ds.tracking.uris import default_database
from tests.helpers.waiting import LIMIT_S, wait_for
from tests.unit.tracking.test_tracking import _expected, _fail, _FakeServer, _log_steps, _tracker


def _save(folder: Path, step: int, digest: str) -> None:
    checkpoint = folder / "checkpoints" / f"step_{step:06d}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "manifest.json").write_text(json.dumps({"digest": digest}))


def test_a_checkpoint_becomes_a_model_with_all_metrics_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_LOOK_EVERY_S", 0.0)
    server = _FakeServer()
    tracker = _tracker(tmp_path, server)
    _log_steps(tracker, 1, 10)
    _save(tmp_path, 10, "a")
    assert tracker.flush(LIMIT_S) and not server.models
    tracker.log(10, {"validation": 1.0})  # comes after the save
    _log_steps(tracker, 11, 20)
    wait_for(lambda: server.models)
    _save(tmp_path, 20, "b")
    (tmp_path / "checkpoints" / ".tmp-step_000030").mkdir()
    _save(tmp_path, 25, "damaged")
    (tmp_path / "checkpoints" / "step_000025" / "manifest.json").write_text("{")
    assert tracker.close(timeout_s=LIMIT_S)
    tracker._sender.join(LIMIT_S)  # type: ignore[union-attr]
    assert server.models == {10: ("a", [(10, True), (10, True)]), 20: ("b", [(20, False)])}, "20 was asked for"
    again = _tracker(tmp_path, server, resumed_step=10)
    _save(tmp_path, 20, "c")  # written again, with another content
    _log_steps(again, 11, 30)
    assert again.close(timeout_s=LIMIT_S)
    again._sender.join(LIMIT_S)  # type: ignore[union-attr]
    assert server.models == {10: ("a", [(10, True), (10, True)]), 20: ("c", [(20, False)])}


def test_a_server_without_models_gets_all_metrics_and_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = _FakeServer()
    server.trouble = lambda when: _fail(when) if when == "before model" else None
    tracker = _tracker(tmp_path, server)
    _log_steps(tracker, 1, 300)
    for step in (10, 20):
        _save(tmp_path, step, str(step))
    assert tracker.close(timeout_s=LIMIT_S) and Counter(server.points) == _expected(300)
    tracker._sender.join(LIMIT_S)  # type: ignore[union-attr]
    assert caplog.text.count("does not store checkpoints as models (ConnectionError") == 1
    assert server.statuses == ["FINISHED"]


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.integers(1, 40), max_size=60), wanted=st.integers(0, 41), torn=st.booleans())
def test_bisection_finds_the_entries_of_a_step(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], wanted: int, torn: bool
) -> None:
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    log = MetricsLog(path, resumed_step=0)
    for number, step in enumerate(sorted(steps)):
        log.append(step, {"x" * (7 * number % 50): number})
    log.close()
    if torn:
        with path.open("ab") as file:
            file.write(b'{"step": 41, "me')
    assert read_step(path, wanted) == [entry for entry in read_metrics(path) if entry.step == wanted]


def test_the_load_of_each_host_is_sent_and_a_restart_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho '1000, 37, 71.5, [N/A]'\necho '2000, 38, 72.5, 40'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    run, server = tmp_path / "run", _FakeServer()
    sent = 0
    for start in range(2):
        tracker = _tracker(run, server, resumed_step=start)
        hosts = [SystemMetrics(run, host, every_s=0.01) for host in ("one", "two/b")]
        for name in ("one", "two_b"):
            path = run / SYSTEM_FOLDER / f"{name}.jsonl"
            wait_for(lambda path=path, sent=sent: len(list(read_metrics(path))) > sent + 1)
        for host in hosts:
            host.close()
            host.close()
        assert tracker.close(timeout_s=LIMIT_S)
        tracker._sender.join(LIMIT_S)  # type: ignore[union-attr]
        sent = max(len(list(read_metrics(path))) for path in (run / SYSTEM_FOLDER).iterdir())
    for name in ("one", "two_b"):
        entries = list(read_metrics(run / SYSTEM_FOLDER / f"{name}.jsonl"))
        assert [entry.step for entry in entries] == list(range(1, len(entries) + 1))
        keys = {f"system/{name}/{key}" for key in ("cpu_utilization_percentage", "disk_available_megabytes")}
        assert keys <= entries[-1].metrics.keys()
        assert entries[-1].metrics[f"system/{name}/gpu_0_memory_usage_megabytes"] == pytest.approx(1048.576)
        assert f"system/{name}/gpu_0_temperature_celsius" not in entries[-1].metrics
        assert entries[-1].metrics[f"system/{name}/gpu_1_temperature_celsius"] == 40
        points = Counter(point for point in server.points if point[0] == f"system/{name}/gpu_1_power_usage_watts")
        assert set(points.values()) == {1} and len(points) >= len(entries) - 1


def test_a_sample_that_cannot_be_written_ends_the_samples_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_folder: Path) -> None:
        raise OSError("disk is gone")

    monkeypatch.setattr(system_metrics, "_sample", full)
    system = SystemMetrics(tmp_path, "one", every_s=0.01)
    system._thread.join(LIMIT_S)
    assert "no more system metrics of one: disk is gone" in caplog.text
    system.close()


def test_runs_of_a_folder_share_a_database_and_a_run_keeps_its_own(tmp_path: Path) -> None:
    first, old = tmp_path / "first", tmp_path / "old"
    assert default_database(first) == tmp_path / "mlflow.db"
    old.mkdir()
    (old / "mlflow.db").touch()
    assert default_database(old) == tmp_path / "mlflow.db", "an empty file is left by a database that was removed"
    (old / "mlflow.db").write_bytes(b"SQLite format 3")
    assert default_database(old) == old / "mlflow.db"
    assert default_database(first) == tmp_path / "mlflow.db"


def test_a_run_alone_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setattr("arc_ds.tracking.uris.os.access", lambda path, _mode: path == run)
    assert default_database(run) == run / "mlflow.db"
    monkeypatch.setattr("arc_ds.tracking.uris.os.access", lambda path, _mode: False)
    assert default_database(run) == tmp_path / "mlflow.db"

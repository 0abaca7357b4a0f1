"""The tracker with the real MLflow: sqlite in the run's folder, kill -9 and resume, and an unreachable server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from arc_ds.config.schema import TrackingConfig
from arc_ds.tracking.mlflow_server import MlflowServer, RunFacts, start_tracker
from arc_ds.tracking.tracking import Tracker

ROOT = Path(__file__).resolve().parents[2]
LOGS_UNTIL_KILLED = """
import sys, time
from pathlib import Path
from arc_ds.config.schema import TrackingConfig
from arc_ds.tracking.mlflow_server import RunFacts, start_tracker
tracker = start_tracker(Path(sys.argv[1]), TrackingConfig(experiment="tests"), RunFacts(params={"seed": 0}),
                        resumed_step=0)
for step in range(1, 10_000):
    tracker.log(step, {"loss": 1.0 / step})
    time.sleep(0.005)
    if tracker.run_id and step % 50 == 0 and tracker.flush(30):
        print(step, tracker.run_id, flush=True)
"""


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def _start(folder: Path, params: dict[str, Any], *, resumed_step: int = 0, uri: str | None = None) -> Tracker:
    facts = RunFacts(
        params=params,
        artifacts={"config.yaml": "seed: 0\n"},
        tags={"host": "here"},
        datasets={"/data/shards": "d" * 40},
    )
    return start_tracker(folder, TrackingConfig(experiment="tests", uri=uri), facts, resumed_step=resumed_step)


def _client(folder: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")


def test_facts_and_metrics_arrive_and_a_changed_parameter_becomes_a_tag(tmp_path: Path) -> None:
    params = {f"key.{number}": number for number in range(150)} | {"long": "x" * 7000}
    first = _start(tmp_path, params)
    first.log(1, {"train/loss": 2.5, "lr/encoder": 1e-5})
    first.log(2, {"train/loss": float("nan")})
    assert first.close("KILLED", timeout_s=120)
    second = _start(tmp_path, {**params, "key.0": "changed"}, resumed_step=2)
    assert second.close("FINISHED", timeout_s=120)
    assert second.run_id == first.run_id is not None
    run = _client(tmp_path).get_run(first.run_id)
    assert len(run.data.params) == 151 and len(run.data.params["long"]) == 6000
    assert run.data.params["key.0"] == "0" and run.data.tags["changed.key.0"] == "changed"
    assert (run.info.status, run.info.run_name) == ("FINISHED", tmp_path.name)
    assert run.inputs.dataset_inputs[0].dataset.name == "shards"
    history = _client(tmp_path).get_metric_history(first.run_id, "train/loss")
    assert [point.step for point in history] == [1, 2] and history[0].value == 2.5
    assert list(tmp_path.glob("mlartifacts/*/artifacts/config.yaml"))
    assert not Path("mlruns").exists()


def test_kill_9_and_resume_leave_one_run_with_one_point_a_step(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", LOGS_UNTIL_KILLED, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        step, run_id = process.stdout.readline().split()
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    resumed = int(step) - 20
    tracker = _start(tmp_path, {"seed": 0}, resumed_step=resumed)
    last = int(step) + 100
    for again in range(resumed + 1, last + 1):
        tracker.log(again, {"loss": 1.0 / again})
    assert tracker.close(timeout_s=120)
    assert tracker.run_id == run_id
    client = _client(tmp_path)
    runs = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert [run.info.run_id for run in runs] == [run_id]
    points = Counter(point.step for point in client.get_metric_history(run_id, "loss"))
    assert points == Counter(range(1, last + 1))


def test_a_kill_while_the_database_is_made_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow can neither use nor repair a database with only half of its tables."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", killed)
        with pytest.raises(KeyboardInterrupt):
            uri, facts = f"sqlite:///{tmp_path}/mlflow.db", RunFacts(params={})
            MlflowServer(uri, TrackingConfig(), facts, tmp_path)
    assert not (tmp_path / "mlflow.db").exists()
    (tmp_path / ".mlflow.db-left-by-a-kill").mkdir()
    tracker = _start(tmp_path, {"seed": 0})
    tracker.log(1, {"loss": 1.0})
    assert tracker.close(timeout_s=120)
    assert [point.step for point in _client(tmp_path).get_metric_history(tracker.run_id, "loss")] == [1]
    assert not list(tmp_path.glob(".mlflow*"))


def test_a_server_that_is_not_there_does_not_hold_the_run(tmp_path: Path) -> None:
    """Port 9 (discard) refuses connections. `log` and `close` have bounded times; the background thread does not."""
    tracker = _start(tmp_path, {"seed": 0}, uri="http://127.0.0.1:9")
    start = time.perf_counter()
    for step in range(1, 101):
        tracker.log(step, {"loss": 1.0})
    assert time.perf_counter() - start < 1.0
    assert not tracker.close(timeout_s=2.0)
    assert time.perf_counter() - start < 10.0
    assert tracker.run_id is None
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 100

"""One MLflow store for several runs: eight starts at once, checkpoints as models, lineage, evaluations, old stores."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from werkzeug.datastructures import MultiDict

from arc_ds.cli import main
from arc_ds.comparison import mlflow_points
from arc_ds.comparison.mlflow_runs import Store, find_run, open_store, read_runs
from arc_ds.config.schema import TrackingConfig
from arc_ds.errors import ConfigError
from arc_ds.evaluation.results import Prediction, write_results
from arc_ds.system.locks import writing
from arc_ds.tracking.evaluation import find_run_of_checkpoint, log_evaluation
from arc_ds.tracking.liveness import mark_dead_runs
from arc_ds.tracking.mlflow_server import RunFacts, start_tracker
from arc_ds.tracking.registration import find_mlflow_run
from arc_ds.tracking.tracking import Tracker
from tests.helpers.waiting import LIMIT_S

ROOT = Path(__file__).resolve().parents[2]
NUM_RUNS, STEPS = 8, 40
# MLflow is imported once, and the processes wait for each other before they start.
EIGHT_RUNS = """
import logging, multiprocessing, sys
from pathlib import Path
import alembic.command, mlflow.store.tracking.sqlalchemy_store, sqlalchemy.orm
from arc_ds.config.schema import TrackingConfig
from arc_ds.tracking.mlflow_server import RunFacts, start_tracker

def run(folder, steps, barrier):
    logging.basicConfig(level=logging.WARNING)
    barrier.wait()
    facts = RunFacts(params={"seed": 0}, datasets={"/data/shards": "d" * 40})
    tracker = start_tracker(folder, TrackingConfig(experiment="tests"), facts, resumed_step=0)
    for step in range(1, steps + 1):
        tracker.log(step, {"train/loss": 1.0 / step, "rate": 2.0})
    sys.exit(0 if tracker.close(timeout_s=300) else 1)

sqlalchemy.orm.configure_mappers()
context = multiprocessing.get_context("fork")
num_runs, steps = int(sys.argv[2]), int(sys.argv[3])
barrier = context.Barrier(num_runs)
each = [context.Process(target=run, args=(Path(sys.argv[1]) / f"run{n}", steps, barrier)) for n in range(num_runs)]
for process in each: process.start()
for process in each: process.join()
sys.exit(max(abs(process.exitcode) for process in each))
"""


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs that started at once, with their store."""
    folder = tmp_path_factory.mktemp("runs")
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", EIGHT_RUNS, str(folder), str(NUM_RUNS), str(STEPS)]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr and "ERROR" not in done.stderr, done.stderr
    return folder


def _client(folder: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")


def _start(folder: Path, *, resumed_step: int = 0, uri: str | None = None, **facts: Any) -> Tracker:
    described = RunFacts(
        **{"params": {"seed": 0}, "datasets": {"/data/shards": "d" * 40}, "held_out": "h" * 64, **facts}
    )
    return start_tracker(folder, TrackingConfig(experiment="tests", uri=uri), described, resumed_step=resumed_step)


def _save(folder: Path, step: int, digest: str) -> None:
    checkpoint = folder / "checkpoints" / f"step_{step:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text(json.dumps({"digest": digest}))


def _close(tracker: Tracker, status: str = "FINISHED") -> str:
    """Close and wait until the checkpoints have been sent, too. Returns the id of the run."""
    assert tracker.close(status, timeout_s=LIMIT_S) and tracker._sender is not None and tracker.run_id is not None
    tracker._sender.join(LIMIT_S)
    return tracker.run_id


def test_eight_runs_that_start_at_once_in_a_new_store_lose_and_double_nothing(store: Path) -> None:
    assert {path.name for path in store.iterdir()} <= {
        "mlflow.db",
        "mlartifacts",
        *(f"run{n}" for n in range(NUM_RUNS)),
    }
    database = sqlite3.connect(store / "mlflow.db")
    assert database.execute("select count(*) from experiments where name = 'tests'").fetchall() == [(1,)]
    assert database.execute("select name, status from runs order by name").fetchall() == [
        (f"run{number}", "FINISHED") for number in range(NUM_RUNS)
    ]
    counts = "select key, count(*), count(distinct step), max(step) from metrics group by run_uuid, key"
    assert sorted(database.execute(counts).fetchall()) == sorted(
        [("rate", STEPS, STEPS, STEPS), ("train/loss", STEPS, STEPS, STEPS)] * NUM_RUNS
    )


def test_checkpoints_stages_and_evaluations_are_linked(store: Path) -> None:
    """Pretraining, fine-tuning from its second checkpoint, evaluation of that; each is logged twice."""
    uri, digest = f"sqlite:///{store}/mlflow.db", "a1" * 16
    first = _start(store / "pretrained")
    for step in range(1, 11):
        first.log(step, {"train/loss": 1.0 / step, "speed/x": 1.0})
    first.log(
        10, {"validation/wide/continuation/nll_open": 2.0, "validation/wide/continuation/gap_closed": float("nan")}
    )
    _save(store / "pretrained", 5, "b" * 32)
    _save(store / "pretrained", 10, digest)
    run_id = _close(first, "KILLED")
    assert _close(_start(store / "pretrained", resumed_step=10)) == run_id
    client = _client(store)
    experiment = client.get_experiment_by_name("tests").experiment_id
    models = {model.name: model for model in client.search_logged_models([experiment])}
    assert {(name, str(model.status)) for name, model in models.items()} == {
        ("step_000005", "READY"),
        ("step_000010", "READY"),
    }
    model = models["step_000010"]
    assert (model.source_run_id, model.model_type, model.tags["arc_ds.checkpoint"]) == (
        run_id,
        "arc-checkpoint",
        digest,
    )
    assert {
        (point.key, point.step, point.value, point.dataset_name, point.dataset_digest) for point in model.metrics
    } == {
        ("train/loss", 10, 0.1, "shards", "d" * 36),
        ("validation/wide/continuation/nll_open", 10, 2.0, "held-out", "h" * 36),
    }, "NaN, which a model would keep as 0, and speed are left out"
    for key in ("train/loss", "speed/x"):
        assert [point.step for point in client.get_metric_history(run_id, key)] == list(range(1, 11))
    outputs = client.get_run(run_id).outputs.model_outputs
    assert sorted((each.model_id, each.step) for each in outputs) == sorted(
        (each.model_id, int(name[-6:])) for name, each in models.items()
    )
    (found,) = client.search_logged_models([experiment], datasets=[{"dataset_name": "held-out"}])
    assert found.model_id == model.model_id

    for _ in range(2):
        tuned = _close(_start(store / "tuned", params={"encoder.init_from": "out"}, source_checkpoint=digest))
    run = client.get_run(tuned)
    assert run.data.tags["mlflow.parentRunId"] == run.data.tags["arc_ds.parent_run"] == run_id
    assert (run.data.tags["arc_ds.stage"], run.data.tags["arc_ds.source_checkpoint"]) == ("fine-tuning", digest)
    assert [each.model_id for each in run.inputs.model_inputs] == [model.model_id]
    other = client.get_run(_close(_start(store / "other", source_checkpoint="c" * 32)))
    assert "arc_ds.parent_run" not in other.data.tags, "its source is not in the store"

    assert find_run_of_checkpoint(uri, digest) == (run_id, 10)
    assert find_run_of_checkpoint(uri, "' OR '1' = '1") is None
    log = ["eval", "score", _results(store, digest), "--log", "tests", "--tracking-uri", uri]
    for _ in range(2):
        assert main(log) == 0
    (path,) = (each.path for each in client.list_artifacts(run_id, "evaluation/step_000010"))
    loaded = json.loads(Path(client.download_artifacts(run_id, path)).read_text())
    table = dict(zip(loaded["columns"], map(list, zip(*loaded["data"], strict=True)), strict=True))
    assert path.startswith("evaluation/step_000010/ARC4-") and table["id"] == ["q1", "q2"]
    assert table["prediction"] == ["Rome", "ARC4"] and table["references"] == [["Rome"], ["Rome"]]
    assert [(point.step, point.value) for point in client.get_metric_history(run_id, "eval/nq/f1")] == [(10, 50.0)]
    scores = {p.key: p.dataset_digest for p in client.get_logged_model(model.model_id).metrics if p.key[:4] == "eval"}
    assert scores == {f"eval/nq/{name}": "e" * 36 for name in ("em", "f1", "substring", "approx_em")}
    assert client.get_run(run_id).info.status == "FINISHED"

    for name, parent, step in (("ARC8", run_id, 10), ("open book", None, 0)):
        run = client.search_runs([experiment], f"attributes.run_name = '{name}'")[0]
        assert (run.info.status, run.data.tags["arc_ds.stage"]) == ("FINISHED", "evaluation")
        assert run.data.tags.get("mlflow.parentRunId") == parent and run.data.metrics["eval/nq/em"] == 50.0
        assert [point.step for point in client.get_metric_history(run.info.run_id, "eval/nq/em")] == [step]
    with pytest.raises(ConfigError, match="cannot be logged in the MLflow run nothing at sqlite"):
        log_evaluation(uri, "nothing", table=table, metrics={}, step=0)


def _results(store: Path, digest: str) -> str:
    """A result folder of two systems of one export of a checkpoint, and of a baseline."""
    for name, content in (("export", {"checkpoint": digest}), ("results", {})):
        (store / name).mkdir()
        (store / name / "config.json").write_text(json.dumps(content))
    systems: list[dict[str, str]] = [{"name": name, "model": str(store / "export")} for name in ("ARC4", "ARC8")]
    run = {"config": {"systems": [*systems, {"name": "open book"}]}, "data_digest": {"nq": "e" * 64}}
    answers = [
        Prediction(id=f"q{n}", task="nq", prediction="Rome" if n == 1 else name, references=("Rome",), system=name)
        for name in ("ARC4", "ARC8", "open book")
        for n in (1, 2)
    ]
    write_results(store / "results", answers, run)
    return str(store / "results")


def test_runs_that_were_killed_are_marked_by_ui_and_named_by_compare(store: Path) -> None:
    """The runs `left` and `lost` were killed here and on another host, and `works` goes on."""
    lock = {"left": socket.gethostname(), "lost": "elsewhere", "works": socket.gethostname()}
    ids = {name: _close(_start(store / name)) for name in lock}
    for name, host in lock.items():
        _client(store).update_run(ids[name], status="RUNNING")
        (store / name / "lock").write_text(f"process 1 on {host}")
        for path in (store / name / "lock", store / name / "metrics.jsonl"):
            os.utime(path, (1_700_000_000, 1_700_000_000))
    opened = open_store(f"sqlite:///{store}/mlflow.db")
    with writing(store / "works", "run"):
        found = read_runs(opened, [find_run(opened, name) for name in lock])
        assert [run.facts["status"] for run in found] == ["DEAD", "SILENT", "RUNNING"]
        assert found[0].notes[-1].startswith("MLflow shows it as RUNNING, but no process of it is left. The last sign")
        assert mark_dead_runs(store / "mlflow.db").keys() == {f"{name} ({ids[name]})" for name in ("left", "lost")}
    runs = {name: _client(store).get_run(ids[name]).info for name in lock}
    assert [info.status for info in runs.values()] == ["KILLED", "RUNNING", "RUNNING"]
    assert runs["left"].end_time == 1_700_000_000_000


def test_a_server_gives_the_same_points_with_one_request_for_each_metric(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handlers of MLflow's server, without its process."""
    import mlflow.utils.rest_utils
    from mlflow.server import app, handlers

    uri, asked = f"sqlite:///{store}/mlflow.db", []
    opened = open_store(uri)
    runs = [find_run(opened, f"run{number}") for number in range(NUM_RUNS)]
    by_sql = read_runs(opened, runs)

    def request(creds: Any, endpoint: str, method: str, *, params: list[tuple[str, str]], timeout: float) -> Any:
        asked.append(endpoint)
        answer = app.test_client().open(endpoint, method=method, query_string=MultiDict(params))
        return SimpleNamespace(status_code=answer.status_code, json=answer.get_json)

    monkeypatch.setattr(handlers, "_tracking_store", handlers._get_tracking_store(uri))
    monkeypatch.setattr(mlflow.utils.rest_utils, "http_request", request)
    monkeypatch.setattr(mlflow_points, "sqlite_database", lambda uri: None)
    for limit, num_requests in ((25_000, 2), (100, 8)):
        monkeypatch.setattr(mlflow_points, "_POINTS_PER_REQUEST", limit)
        asked.clear()
        by_server = read_runs(Store("http://host", opened.client), runs)
        assert list(map(repr, by_server)) == list(map(repr, by_sql)) and len(asked) == num_requests


def test_a_run_with_a_store_of_its_own_continues_there(store: Path) -> None:
    folder = store / "old"
    folder.mkdir()
    shutil.copy(store / "mlflow.db", folder / "mlflow.db")
    first = _start(folder, uri=f"sqlite:///{folder}/mlflow.db")
    for step in range(1, 21):
        first.log(step, {"train/loss": 1.0 / step})
    run_id = _close(first, "KILLED")
    again = _start(folder, resumed_step=15)
    for step in range(16, 31):
        again.log(step, {"train/loss": 1.0 / step})
    assert _close(again) == run_id
    assert find_mlflow_run(folder, None) == (f"sqlite:///{folder}/mlflow.db", run_id)
    history = _client(folder).get_metric_history(run_id, "train/loss")
    assert sorted(point.step for point in history) == list(range(1, 31))
    database = sqlite3.connect(store / "mlflow.db")
    assert database.execute("select count(*) from runs where name = 'old'").fetchall() == [(0,)]

"""The tracker with the real MLflow: one sqlite for all runs of a folder, kill -9 and resume, an unreachable server."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from arc_ds.config.schema import TrackingConfig
from arc_ds.tracking.mlflow_server import MlflowServer, RunFacts, start_tracker
from arc_ds.tracking.tracking import Tracker
from tests.helpers.waiting import LIMIT_S

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
    if step % 50 == 0 and tracker.flush(300) and tracker.run_id:
        print(step, tracker.run_id, flush=True)
"""
NO_USER = """
import pwd, sys, time
def no_entry(uid):
    raise KeyError("getpwuid(): uid not found")
pwd.getpwuid = no_entry
try:
    import mlflow
    raise SystemExit("MLflow needs no home any more: remove home")
except RuntimeError:
    pass
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
    first = _start(tmp_path / "run", params)
    first.log(1, {"train/loss": 2.5, "lr/encoder": 1e-5})
    first.log(2, {"train/loss": float("nan")})
    assert first.close("KILLED", timeout_s=LIMIT_S)
    second = _start(tmp_path / "run", {**params, "key.0": "changed"}, resumed_step=2)
    assert second.close("FINISHED", timeout_s=LIMIT_S)
    assert second.run_id == first.run_id is not None
    run = _client(tmp_path).get_run(first.run_id)
    assert len(run.data.params) == 151 and len(run.data.params["long"]) == 6000
    assert run.data.params["long"].endswith("x... [7000 characters, whole in long_parameters.json]")
    (whole,) = tmp_path.glob("mlartifacts/*/artifacts/long_parameters.json")
    assert json.loads(whole.read_text()) == {"long": "x" * 7000} and "changed.long" not in run.data.tags
    assert run.data.tags["arc_ds.run_dir"] == str(tmp_path / "run") and run.data.tags["arc_ds.stage"] == "pretraining"
    assert run.data.params["key.0"] == "0" and run.data.tags["changed.key.0"] == "changed"
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.inputs.dataset_inputs[0].dataset.name == "shards"
    history = _client(tmp_path).get_metric_history(first.run_id, "train/loss")
    assert [point.step for point in history] == [1, 2] and history[0].value == 2.5
    assert list(tmp_path.glob("mlartifacts/*/artifacts/config.yaml"))
    assert not Path("mlruns").exists()
    third = _start(tmp_path / "run", params, resumed_step=2)
    assert third.close(timeout_s=LIMIT_S)
    assert _client(tmp_path).get_run(first.run_id).data.tags["changed.key.0"] == "0", "it has its first value again"


def test_a_copied_folder_is_a_run_of_its_own_and_a_moved_one_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original = _start(tmp_path / "run", {"seed": 0})
    _log(original, 1, 20)
    assert original.close("KILLED", timeout_s=LIMIT_S)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    for _ in range(2):
        copy = _start(tmp_path / "copy", {"seed": 0}, resumed_step=10)
        _log(copy, 11, 30)
        assert copy.close(timeout_s=LIMIT_S) and copy.run_id != original.run_id
    (warning,) = _warnings(caplog)
    assert f"has no run {original.run_id} of this folder: it was deleted, or this folder is a copy" in warning
    (tmp_path / "run").rename(tmp_path / "renamed")
    moved = _start(tmp_path / "renamed", {"seed": 0}, resumed_step=20)
    _log(moved, 21, 25)
    assert moved.close(timeout_s=LIMIT_S) and moved.run_id == original.run_id
    assert _steps(tmp_path, moved.run_id) == list(range(1, 26))
    assert _steps(tmp_path, copy.run_id) == list(range(1, 31))


def test_kill_9_and_resume_leave_one_run_with_one_point_a_step(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOGS_UNTIL_KILLED, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        step, run_id = process.stdout.readline().split()
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    assert _client(tmp_path).get_run(run_id).info.status == "RUNNING", "until the next start"
    resumed = int(step) - 20
    tracker = _start(tmp_path / "run", {"seed": 0}, resumed_step=resumed)
    last = int(step) + 100
    for again in range(resumed + 1, last + 1):
        tracker.log(again, {"loss": 1.0 / again})
    assert tracker.close(timeout_s=LIMIT_S)
    assert tracker.run_id == run_id
    client = _client(tmp_path)
    runs = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert [(run.info.run_id, run.info.status) for run in runs] == [(run_id, "FINISHED")]
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
    (tmp_path / ".mlflow.db-new" / "left-by-a-kill").mkdir(parents=True)

    def no_links(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "this file system has no hard links")

    monkeypatch.setattr(os, "link", no_links)
    tracker = _start(tmp_path / "run", {"seed": 0})
    tracker.log(1, {"loss": 1.0})
    assert tracker.close(timeout_s=LIMIT_S)
    assert [point.step for point in _client(tmp_path).get_metric_history(tracker.run_id, "loss")] == [1]
    assert not list(tmp_path.glob(".mlflow*"))


def _log(tracker: Tracker, first: int, last: int) -> None:
    for step in range(first, last + 1):
        tracker.log(step, {"loss": 1.0 / step, "rate": 2.0})


def _steps(folder: Path, run_id: str | None, key: str = "loss") -> list[int]:
    return sorted(point.step for point in _client(folder).get_metric_history(run_id, key))


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("arc_ds")]


@pytest.mark.parametrize("removed", ["run", "database"])
@pytest.mark.parametrize("when", ["between two starts", "while the run works", "after its last metric"])
def test_a_run_that_the_server_lost_is_replaced_with_all_its_metrics(tmp_path: Path, removed: str, when: str) -> None:
    tracker = _start(tmp_path / "run", {"seed": 0})
    _log(tracker, 1, 40)
    assert tracker.flush(LIMIT_S)
    former = tracker.run_id
    if when == "between two starts":
        assert tracker.close("KILLED", timeout_s=LIMIT_S)
    if removed == "run":
        _client(tmp_path).delete_run(former)
    else:
        (tmp_path / "mlflow.db").unlink()
    if when == "between two starts":
        tracker = _start(tmp_path / "run", {"seed": 0}, resumed_step=40)
    last = 40 if when == "after its last metric" else 60
    _log(tracker, 41, last)
    assert tracker.close(timeout_s=LIMIT_S) and tracker.run_id != former
    assert _steps(tmp_path, tracker.run_id) == _steps(tmp_path, tracker.run_id, "rate") == list(range(1, last + 1))
    run = _client(tmp_path).get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and run.data.params == {"seed": "0"}
    assert list(tmp_path.glob(f"mlartifacts/{tracker.run_id}/artifacts/config.yaml"))


def test_a_database_that_was_restored_gets_the_points_that_it_lacks(tmp_path: Path) -> None:
    tracker = _start(tmp_path / "run", {"seed": 0})
    _log(tracker, 1, 40)
    assert tracker.flush(LIMIT_S)
    shutil.copy(tmp_path / "mlflow.db", tmp_path / "backup")
    _log(tracker, 41, 60)
    assert tracker.close("KILLED", timeout_s=LIMIT_S)
    os.replace(tmp_path / "backup", tmp_path / "mlflow.db")
    again = _start(tmp_path / "run", {"seed": 0}, resumed_step=60)
    _log(again, 61, 80)
    assert again.close(timeout_s=LIMIT_S) and again.run_id == tracker.run_id
    assert _steps(tmp_path, again.run_id) == _steps(tmp_path, again.run_id, "rate") == list(range(1, 81))


def test_what_mlflow_refuses_keeps_nothing_else_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mlartifacts").write_text("no folder")
    facts = RunFacts(
        params={f"key.{number}": number for number in range(150)} | {"k" * 300: 1, "a(b)": 2},
        artifacts={"config.yaml": "", "deepspeed.json": ""},
        tags={"a tag!": "refused", "host": "here"},
        datasets={"/data/shards": "d" * 40},
    )
    tracker = start_tracker(tmp_path / "run", TrackingConfig(experiment='it\'s a `test` "%"'), facts, resumed_step=0)
    for step in range(1, 101):
        tracker.log(step, {"loss": 1.0, "AP@50(x)": 1.0, "n" * 300: 1.0})
    assert tracker.close(timeout_s=LIMIT_S)
    run = _client(tmp_path).get_run(tracker.run_id)
    assert len(run.data.params) == 151 and run.data.params["a_b_"] == "2"
    assert run.data.tags["host"] == "here" and len(run.inputs.dataset_inputs) == 1
    assert _steps(tmp_path, tracker.run_id) == _steps(tmp_path, tracker.run_id, "AP_50_x_") == list(range(1, 101))
    refused = ("parameter kkk", "tag a tag!", "metric nnn", "config.yaml, deepspeed.json")
    assert sorted(next(name for name in refused if name in text) for text in _warnings(caplog)) == sorted(refused)
    assert str(tmp_path / "mlartifacts") in caplog.text


def test_a_folder_as_address_is_used_if_the_user_allows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracker = _start(tmp_path / "run", {"seed": 0}, uri=str(tmp_path / "file?store"))
    assert tracker.close(timeout_s=LIMIT_S) and list(tmp_path.glob("file[?]store/*/*/artifacts/config.yaml"))


@pytest.mark.parametrize("name", ["is it good?", "50%41 #é"])
def test_a_folder_with_characters_that_urls_quote_holds_all_of_its_run(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "runs" / name
    for resumed in (0, 5):
        tracker = _start(folder / "run", {"seed": 0}, resumed_step=resumed)
        _log(tracker, resumed + 1, resumed + 5)
        assert tracker.close(timeout_s=LIMIT_S)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {name}
    assert {path.name for path in folder.iterdir()} == {"mlartifacts", "mlflow.db", "run"}
    assert list(folder.glob(f"mlartifacts/{tracker.run_id}/artifacts/config.yaml"))
    (tmp_path / "mlflow.db").symlink_to(folder / "mlflow.db")
    assert _steps(tmp_path, tracker.run_id) == list(range(1, 11))


def test_runs_on_one_store_keep_their_artifacts_beside_it(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/store/mlflow.db"
    runs = [_start(tmp_path / name, {"seed": 0}, uri=uri) for name in ("first", "second")]
    assert all(run.close(timeout_s=LIMIT_S) for run in runs)
    places = {path.relative_to(tmp_path / "store").parts[:2] for path in tmp_path.rglob("config.yaml")}
    assert places == {("mlartifacts", run.run_id) for run in runs}


def test_a_deleted_experiment_is_named_with_its_cure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = _start(tmp_path / "run", {"seed": 0})
    _log(tracker, 1, 5)
    assert tracker.close("KILLED", timeout_s=LIMIT_S)
    experiment_id = _client(tmp_path).get_experiment_by_name("tests").experiment_id
    _client(tmp_path).delete_experiment(experiment_id)
    assert not _start(tmp_path / "run", {"seed": 0}, resumed_step=5).close(timeout_s=LIMIT_S)
    (warning,) = _warnings(caplog)
    assert f"mlflow experiments restore --experiment-id {experiment_id}" in warning
    _client(tmp_path).restore_experiment(experiment_id)
    again = _start(tmp_path / "run", {"seed": 0}, resumed_step=5)
    assert again.close(timeout_s=LIMIT_S) and _steps(tmp_path, again.run_id) == [1, 2, 3, 4, 5]


class _Answer(BaseHTTPRequestHandler):
    """A server that gives one answer to everything."""

    answer: tuple[int, str]

    def do_GET(self) -> None:
        status, body = self.answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


_LASTING = [(401, "<html>"), (403, '{"error_code": "PERMISSION_DENIED"}'), (404, "<html>"), (400, "<html>")]
_PASSING = [
    (503, ""),
    (429, ""),
    (521, "<html>"),
    (500, '{"error_code": "INTERNAL_ERROR"}'),
    (400, '{"error_code": "BAD_REQUEST", "message": "the pool of the server\'s database is exhausted"}'),
]


@pytest.mark.parametrize("answer", _LASTING + _PASSING)
def test_answers_that_time_cannot_mend_are_told_from_a_server_that_is_down(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, answer: tuple[int, str]
) -> None:
    kind = type("_OneAnswer", (_Answer,), {"answer": answer})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tracker = _start(tmp_path / "run", {"seed": 0}, uri=f"http://me:secret@127.0.0.1:{server.server_port}")
        _log(tracker, 1, 5)
        assert not tracker.close(timeout_s=LIMIT_S)
        server.shutdown()
    is_lasting = "cannot be used in this start" in caplog.text
    assert is_lasting == (answer in _LASTING) and is_lasting != ("did not receive all metrics" in caplog.text)
    assert ("MLFLOW_TRACKING_USERNAME" in caplog.text) == (answer[0] in (401, 403)) and "secret" not in caplog.text


@pytest.mark.parametrize(
    ("uri", "cure"),
    [
        ("localhost:5000", "Set tracking.uri to http://localhost:5000."),
        ("foo://host", "Correct tracking.uri"),
        ("http://[::1", "Correct tracking.uri"),
        ("sqlite:///{}", "Correct tracking.uri"),
        ("sqlite:///{}/no_database", "Correct tracking.uri"),
    ],
)
def test_an_address_that_can_never_work_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, uri: str, cure: str
) -> None:
    (tmp_path / "no_database").write_text("text " * 1000)
    tracker = _start(tmp_path / "run", {"seed": 0}, uri=uri.format(tmp_path))
    _log(tracker, 1, 5)
    assert not tracker.close(timeout_s=LIMIT_S)
    (warning,) = _warnings(caplog)
    assert cure in warning and "the next start of this run sends them" in warning


def test_a_user_without_home_and_passwd_entry_gets_metrics(tmp_path: Path) -> None:
    """Containers with `--user 12345`. DeepSpeed has tried to import MLflow before, and failed."""
    code = LOGS_UNTIL_KILLED.replace("10_000", "51").replace("import sys, time", NO_USER)
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "USER", "LOGNAME")}
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    printed = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert printed.split()[0] == "50"
    assert _steps(tmp_path, printed.split()[1]) == list(range(1, 51))

"""The tracker with an in-memory server that can be slow or dead, lose responses and recover."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.engine import make_url

from arc_ds.errors import ConfigError, StorageError
from arc_ds.tracking import tracking
from arc_ds.tracking.checkpoint_models import Checkpoint
from arc_ds.tracking.database import paged
from arc_ds.tracking.faults import words_of
from arc_ds.tracking.metrics_log import MetricsEntry, MetricsLog, read_metrics
from arc_ds.tracking.mlflow_server import MlflowServer, environment_tags
from arc_ds.tracking.tracking import Tracker
from arc_ds.tracking.tracking_state import STATE_NAME, load_state, save_state
from arc_ds.tracking.uris import check_uri, file_store, resolve_uri, sqlite_database, without_secret
from tests.helpers.full_disk import limited_file_size
from tests.helpers.waiting import LIMIT_S


class _FakeServer:
    """Keeps every point it receives, as MLflow does. Each method calls `trouble` before and after its work."""

    def __init__(self) -> None:
        self.points: list[tuple[str, int]] = []
        self.runs: dict[str, str] = {}
        self.statuses: list[str] = []
        self.described = 0
        self.models: dict[int, tuple[str, list[tuple[int, bool]]]] = {}
        self.refused: dict[str, Exception] = {}
        self.trouble: Callable[[str], None] = lambda _when: None

    def open_run(self, run_key: str, run_id: str | None) -> str:
        self.trouble("before open")
        opened = self.runs.setdefault(run_key, run_id or f"run{len(self.runs)}")
        self.trouble("after open")
        return opened

    def describe(self, run_id: str) -> dict[str, Exception]:
        self.trouble("before describe")
        self.described += 1
        return self.refused

    def store_artifacts(self, run_id: str) -> dict[str, Exception]:
        return self.refused

    def steps_of(self, run_id: str, key: str, from_step: int) -> set[int]:
        self.trouble("before steps")
        return {step for name, step in self.points if name == key and step >= from_step}

    def send(self, run_id: str, entries: list[MetricsEntry]) -> dict[str, Exception]:
        self.trouble("before send")
        self.points += [(key, entry.step) for entry in entries for key in entry.metrics]
        self.trouble("after send")
        return {}

    def end_run(self, run_id: str, status: str) -> None:
        self.statuses.append(status)

    def logged_checkpoints(self, run_id: str) -> dict[int, str]:
        self.trouble("before models")
        return {step: digest for step, (digest, _) in self.models.items()}

    def log_checkpoint(
        self, run_id: str, checkpoint: Checkpoint, entries: list[MetricsEntry], *, are_ours: bool
    ) -> None:
        self.trouble("before model")
        self.models[checkpoint.step] = (checkpoint.digest, [(entry.step, are_ours) for entry in entries])


def _tracker(folder: Path, server: _FakeServer, resumed_step: int = 0, run_id: str | None = None) -> Tracker:
    return Tracker(folder, uri="fake", make_server=lambda: server, resumed_step=resumed_step, run_id=run_id)  # type: ignore[arg-type]


@pytest.fixture(autouse=True, scope="module")
def _short_pauses() -> Iterator[None]:
    with mock.patch.object(tracking, "_FIRST_PAUSE_S", 0.01):
        yield


def _log_steps(tracker: Tracker, first: int, last: int) -> None:
    for step in range(first, last + 1):
        tracker.log(step, {"loss": 1.0 / step, "rate": 2.0})


def _expected(last: int) -> Counter[tuple[str, int]]:
    return Counter({(key, step): 1 for key in ("loss", "rate") for step in range(1, last + 1)})


def _fail(_when: str) -> None:
    raise ConnectionError("no answer")


def test_every_point_arrives_once_and_the_run_ends(tmp_path: Path) -> None:
    server = _FakeServer()
    tracker = _tracker(tmp_path, server)
    _log_steps(tracker, 1, 500)
    assert tracker.close("FINISHED")
    assert Counter(server.points) == _expected(500)
    assert (server.statuses, server.described, tracker.run_id) == (["FINISHED"], 1, "run0")


def test_a_dead_server_costs_the_step_nothing_and_is_warned_about_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = _FakeServer()
    server.trouble = _fail
    tracker = _tracker(tmp_path, server)
    _log_steps(tracker, 1, 200)
    assert not tracker.close(timeout_s=LIMIT_S)
    assert tracker.run_id is None
    assert caplog.text.count("does not accept metrics") == 1
    assert len(list(read_metrics(tmp_path / "metrics.jsonl"))) == 200


def test_a_server_that_hangs_does_not_hold_the_step(tmp_path: Path) -> None:
    server, release = _FakeServer(), threading.Event()

    def hang(_when: str) -> None:
        assert threading.current_thread() is not threading.main_thread(), "the step talks to the server"
        assert release.wait(LIMIT_S)

    server.trouble = hang
    tracker = _tracker(tmp_path, server)
    _log_steps(tracker, 1, 100)
    assert not tracker.flush(timeout_s=0.05)
    release.set()
    assert tracker.close(timeout_s=LIMIT_S) and Counter(server.points) == _expected(100)


@pytest.mark.parametrize(
    "when", ["before open", "after open", "before describe", "before steps", "before send", "after send"]
)
def test_a_failure_at_any_point_loses_no_metric_and_doubles_none(tmp_path: Path, when: str) -> None:
    """After "send", the metrics have arrived and only the answer is lost."""
    server, failures = _FakeServer(), iter([True] * 3)
    server.trouble = lambda now: _fail(now) if now == when and next(failures, False) else None
    tracker = _tracker(tmp_path, server)
    _log_steps(tracker, 1, 300)
    tracker.flush(timeout_s=LIMIT_S)
    assert tracker.close(timeout_s=LIMIT_S) and len(list(failures)) < 3
    assert Counter(server.points) == _expected(300) and len(server.runs) == 1


@settings(max_examples=15, deadline=None)
@given(
    starts=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), st.booleans()), min_size=1, max_size=4),
    lose_state=st.booleans(),
)
def test_one_point_a_step_after_any_kills(
    tmp_path_factory: pytest.TempPathFactory, starts: list[tuple[int, int, bool]], lose_state: bool
) -> None:
    """Each start runs `ahead` steps past its checkpoint, may send them, and is killed. The last one completes."""
    folder, server, saved, known_id = tmp_path_factory.mktemp("run"), _FakeServer(), 0, None
    for ahead, checkpoint, sends in starts:
        tracker = _tracker(folder, server, resumed_step=saved, run_id=known_id)
        _log_steps(tracker, saved + 1, saved + ahead)
        if sends:
            assert tracker.flush(timeout_s=LIMIT_S)
            known_id = tracker.run_id
            if lose_state:
                (folder / STATE_NAME).unlink()
        _kill(tracker)
        saved += min(checkpoint, ahead)
    last = _tracker(folder, server, resumed_step=saved, run_id=known_id)
    _log_steps(last, saved + 1, 60)
    assert last.close()
    assert Counter(server.points) == _expected(60) and (lose_state or len(server.runs) == 1)
    entries = [entry.step for entry in read_metrics(folder / "metrics.jsonl")]
    assert entries == list(range(1, 61))


def _kill(tracker: Tracker) -> None:
    """Simulates kill -9: the thread stops at once, and the last line of the file is incomplete."""
    sender = tracker._sender
    assert sender is not None
    sender.advance = lambda: True  # type: ignore[method-assign]
    sender.finish = lambda _status: None  # type: ignore[method-assign]
    sender.final_status = "killed"
    sender.hurry.set()
    sender.join()
    tracker._log.close()
    with tracker._log.path.open("ab") as file:
        file.write(b'{"step": 99, "ti')


def test_a_part_of_the_description_that_fails_keeps_nothing_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = _FakeServer()
    server.refused = {name: ValueError(f"{name} too\nlong " * 99 + "shorten it") for name in ("a.yaml", "b.json")}
    tracker = _tracker(tmp_path, server)
    _log_steps(tracker, 1, 300)
    tracker.flush(timeout_s=LIMIT_S)
    failures = iter([True] * 2)
    server.trouble = lambda now: _fail(now) if next(failures, False) else None
    _log_steps(tracker, 301, 400)
    assert tracker.close(timeout_s=LIMIT_S) and Counter(server.points) == _expected(400)
    assert caplog.text.count("could not store a.yaml, b.json (ValueError: a.yaml too long") == 1
    assert "shorten it)" in caplog.text, "the end of another tool's message is kept: it holds the remedy"


def test_a_fault_that_time_cannot_mend_is_tried_again_only_at_the_next_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = []

    def make_server() -> MlflowServer:
        attempts.append(1)
        raise ModuleNotFoundError("No module named 'psycopg'")

    tracker = Tracker(tmp_path, uri="postgresql://host/db", make_server=make_server, resumed_step=0)
    _log_steps(tracker, 1, 100)
    assert tracker._sender is not None
    tracker._sender.join(LIMIT_S)  # it ends after its only attempt
    assert not tracker.flush(timeout_s=LIMIT_S) and not tracker.close() and len(attempts) == 1
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "No module named 'psycopg'). Install the missing package. Training goes on" in warning
    server = _FakeServer()
    assert _tracker(tmp_path, server, resumed_step=100).close() and Counter(server.points) == _expected(100)


def test_after_the_server_has_worked_every_fault_is_tried_again(tmp_path: Path) -> None:
    server, failures = _FakeServer(), iter([True] * 4)
    tracker = _tracker(tmp_path, server)
    _log_steps(tracker, 1, 10)
    assert tracker.flush(timeout_s=LIMIT_S)

    def deleted(_when: str) -> None:
        if next(failures, False):
            raise ConfigError("the experiment was deleted")

    server.trouble = deleted
    _log_steps(tracker, 11, 20)
    tracker.flush(timeout_s=LIMIT_S)
    assert tracker.close(timeout_s=LIMIT_S) and Counter(server.points) == _expected(20)


@pytest.mark.parametrize("when", ["between two starts", "while the run works"])
@pytest.mark.parametrize("left", [0, 77, 150])
def test_points_that_a_restored_server_lacks_are_sent_again(tmp_path: Path, when: str, left: int) -> None:
    server = _FakeServer()
    tracker = _tracker(tmp_path, server)
    _log_steps(tracker, 1, 150)
    assert tracker.flush(timeout_s=LIMIT_S)
    if when == "between two starts":
        tracker.close("KILLED")
        tracker = _tracker(tmp_path, server, resumed_step=150)
    tracker._sender.hurry.clear()  # type: ignore[union-attr]
    del server.points[left:]
    _log_steps(tracker, 151, 200)
    assert tracker.close(timeout_s=LIMIT_S) and Counter(server.points) == _expected(200)


def test_a_folder_that_is_renamed_while_its_run_works_ends_no_step(tmp_path: Path) -> None:
    server = _FakeServer()
    tracker = _tracker(tmp_path / "run", server)
    _log_steps(tracker, 1, 10)
    assert tracker.flush(timeout_s=LIMIT_S)
    (tmp_path / "run").rename(tmp_path / "renamed")
    _log_steps(tracker, 11, 20)
    assert not tracker.close("KILLED", timeout_s=1.0)
    again = _tracker(tmp_path / "renamed", server, resumed_step=20)
    assert again.close(timeout_s=LIMIT_S) and Counter(server.points) == _expected(20)


def test_all_pages_of_a_search_are_read() -> None:
    class Page(list[int]):
        token: str | None

    def search(first: int, *, page_token: str | None, size: int) -> Page:
        start = first + int(page_token or 0)
        page = Page(range(start, min(start + size, 7)))
        page.token = str(start + size - first) if start + size < 7 else None
        return page

    assert list(paged(search, 1, size=2)) == [1, 2, 3, 4, 5, 6]


def test_without_a_server_the_file_alone_is_written(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, resumed_step=0)
    tracker.log(3, {"loss": float("nan")})
    assert tracker.flush(0) and tracker.close() and tracker.run_id is None
    assert not (tmp_path / STATE_NAME).exists()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 3


def test_resume_cuts_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, resumed_step=0)
    for step in (1, 2, 2, 3, 4):
        log.append(step, {"loss": float(step)})
    log.close()
    with path.open("ab") as file:
        file.write(b'{"step": 5, "tim')
    MetricsLog(path, resumed_step=4).close()
    assert [entry.step for entry in read_metrics(path)] == [1, 2, 2, 3, 4]
    MetricsLog(path, resumed_step=2).close()
    assert [entry.step for entry in read_metrics(path)] == [1, 2, 2]
    MetricsLog(path, resumed_step=0).close()
    assert path.read_bytes() == b""


def test_a_damaged_state_or_another_server_begins_anew(tmp_path: Path) -> None:
    state = load_state(tmp_path, uri="a", resumed_step=0, run_id="known")
    assert state.run_id == "known"
    save_state(tmp_path, state)
    assert load_state(tmp_path, uri="a", resumed_step=0, run_id=None) == state
    other = load_state(tmp_path, uri="b", resumed_step=9, run_id="known")
    assert (other.run_id, other.sent_step) == (None, 0)
    (tmp_path / STATE_NAME).write_text(json.dumps(asdict(state) | {"run_key": "a' OR tags.x = '"}))
    assert len(load_state(tmp_path, uri="a", resumed_step=0, run_id="known").run_key) == 32, "it stands in a query"
    (tmp_path / STATE_NAME).write_text('{"run_key')
    assert load_state(tmp_path, uri="a", resumed_step=5, run_id="known").run_id == "known"


def test_the_environments_uri_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri(tmp_path / "run", None) == f"sqlite:///{tmp_path}/mlflow.db"
    assert resolve_uri(tmp_path, "http://one") == "http://one"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://two")
    assert resolve_uri(tmp_path, "http://one") == "http://two"


@pytest.mark.parametrize("name", ["is it good?", "50%41", "a#b", "x y é", "it's [1]{2}@:"])
def test_characters_that_urls_quote_may_stand_in_a_folders_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / name
    uri = resolve_uri(folder / "run", None)
    assert make_url(uri).database == f"{folder}/mlflow.db" and sqlite_database(uri) == folder / "mlflow.db"
    assert file_store(resolve_uri(tmp_path, str(folder))) == folder
    assert url2pathname(urlsplit(resolve_uri(tmp_path, str(folder))).path) == str(folder), "as MLflow reads it"


def test_a_password_in_the_uri_is_not_written_down() -> None:
    assert without_secret("https://me:secret@host:5000/path") == "https://host:5000/path"
    assert "secret" not in words_of(ValueError("API request to http://me:secret@host/api failed"))
    assert without_secret("http://me:secret@[::1") == "http://[::1", "a malformed address does not end the run"
    assert without_secret("sqlite:////tmp/mlflow.db") == "sqlite:////tmp/mlflow.db"


def test_tags_tell_where_a_run_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "CROSS_RANK", "SLURM_PROCID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    place: dict[str, Any] = {
        "device": "a CPU", "hosts": ["b", "b", "a", "a"], "placements": {"wide": "replicated", "far": "zero3"}
    }  # fmt: skip
    tags = environment_tags(**place)
    assert tags["device"] == "a CPU" and tags["world_size"] == "4" and tags["version.torch"]
    assert (tags["host"], tags["hosts"], tags["num_hosts"]) == ("b", "b, a", "2")
    assert tags["placement.wide"] == "replicated" and tags["placement.far"] == "zero3"
    assert tags["launcher"] == "none" and "slurm_job" not in tags
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert environment_tags(**place)["launcher"] == "srun" and environment_tags(**place)["slurm_job"] == "17"
    monkeypatch.setenv("CROSS_RANK", "0")
    assert environment_tags(**place)["launcher"] == "deepspeed"


def test_a_full_disk_is_an_error_in_words_and_the_log_can_be_closed(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", resumed_step=0)
    with limited_file_size(10):
        with pytest.raises(StorageError, match=r"metrics\.jsonl cannot be written: File too large"):
            log.append(1, {"loss": 1.0})
        log.close()


def test_a_folder_that_mlflow_no_longer_writes_to_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    for uri in (str(tmp_path / "mlruns"), f"file://{tmp_path}/mlruns"):
        with pytest.raises(ConfigError, match=r"tracking.uri is the folder .*mlruns.*tracking.uri=sqlite:") as caught:
            check_uri(tmp_path, uri)
    check_uri(tmp_path, re.findall(r"sqlite:\S+mlflow\.db", str(caught.value))[-1])  # the remedy
    check_uri(tmp_path, "http://127.0.0.1:5000")
    check_uri(tmp_path, None)
    with pytest.raises(ConfigError, match="Set tracking.uri=http://127.0.0.1:5000$"):
        check_uri(tmp_path, "127.0.0.1:5000")
    with pytest.raises(ConfigError, match=r"tracking.uri=sqlite:\S+/runs/my\.db\. "):
        check_uri(tmp_path, "runs/my.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    with pytest.raises(ConfigError, match=r"MLFLOW_TRACKING_URI is the folder .*: MLFLOW_TRACKING_URI=sqlite:"):
        check_uri(tmp_path, "sqlite:////tmp/a.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setattr("arc_ds.tracking.uris.version", lambda name: "3.12.1")
    check_uri(tmp_path, str(tmp_path / "mlruns"))
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    check_uri(tmp_path, str(tmp_path / "mlruns"))

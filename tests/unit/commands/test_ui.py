"""`arc-ds ui` finds the store of a folder, and names the remedy if there is none or another program uses the port."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from pathlib import Path
from typing import Any, ClassVar

import pytest

from arc_ds.cli import main
from arc_ds.commands import ui
from arc_ds.commands.ui import find_database
from arc_ds.errors import ConfigError


def _database(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mlflow.db").write_bytes(b"SQLite format 3")
    return folder / "mlflow.db"


def _run(folder: Path, uri: str | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").touch()
    if uri is not None:
        (folder / "tracking_state.json").write_text(json.dumps({"run_key": "a", "uri": uri}))
    return folder


def test_a_folder_of_runs_a_run_and_a_file_lead_to_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = _database(tmp_path / "runs")
    first = _run(tmp_path / "runs" / "first")
    assert find_database(tmp_path / "runs") == find_database(first) == find_database(shared) == shared
    own = _database(_run(tmp_path / "runs" / "old"))
    assert find_database(own.parent) == own
    elsewhere = _database(tmp_path / "else where")
    assert find_database(_run(tmp_path / "runs" / "far", f"sqlite:///{elsewhere}")) == elsewhere
    for name in ("MLFLOW_TRACKING_URI", "RUNS"):
        monkeypatch.delenv(name, raising=False)
    for place in (tmp_path, tmp_path / "runs"):
        monkeypatch.chdir(place)
        assert find_database(None) == shared
    monkeypatch.setenv("RUNS", str(elsewhere.parent))
    assert find_database(None) == elsewhere
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(own))
    assert find_database(None) == own
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host:5000")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI is the server http://host:5000. Open that"):
        find_database(None)


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("missing", "missing does not exist. Give the folder that holds your runs: arc-ds ui FOLDER"),
        ("empty", "empty holds no MLflow store .* give that folder"),
        ("above", "Its subfolders do. Try: arc-ds ui .*/above/runs$"),
        ("untracked", "It holds 2 runs without one. .* tracking.mlflow=true"),
        ("untracked/a", "This run was made with tracking.mlflow=false"),
        ("served", "is tracked by the server http://host:5000. Open that address in a browser"),
    ],
)
def test_a_folder_without_store_says_what_to_do(tmp_path: Path, folder: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    _database(tmp_path / "above" / "runs")
    for name in "ab":
        _run(tmp_path / "untracked" / name)
    _run(tmp_path / "served", "http://host:5000")
    with pytest.raises(ConfigError, match=words):
        find_database(tmp_path / folder)


class _Server:
    """The server's process in place of MLflow's."""

    pid = 0
    commands: ClassVar[list[list[str]]] = []

    def __init__(self, command: list[str], **_: Any) -> None:
        self.commands.append(command)

    def poll(self) -> int | None:
        return 3

    def wait(self, timeout: float | None = None) -> int:
        return 3


def test_a_taken_port_names_a_free_one_and_a_failed_start_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _database(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", _Server)
    monkeypatch.setattr(ui.os, "killpg", lambda *_: None)
    monkeypatch.setattr(ui.signal, "signal", lambda *_: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["ui", str(tmp_path), "--port", str(taken.getsockname()[1])]) == 2
        error = capsys.readouterr().err
        assert re.search(rf"is taken .* Take another one: arc-ds ui {tmp_path} --port \d+$", error.strip())
        assert not _Server.commands
        remedy = error.split("arc-ds ui ")[-1].split()
        assert main(["ui", *remedy]) == 2
    assert "mlflow server ended with code 3" in capsys.readouterr().err
    (command,) = _Server.commands
    assert f"sqlite:///{store}" in command and (tmp_path / "mlartifacts").as_uri() in command
    assert main(["ui", str(tmp_path), "--port", "70000"]) == 2
    assert main(["ui", str(tmp_path), "--host", "203.0.113.1"]) == 2
    assert "cannot listen on --host 203.0.113.1" in capsys.readouterr().err

"""`arc-ds export --register` with the real MLflow: the model loads and compresses in a fresh process."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arc_ds import ArcModel
from arc_ds.checkpoints.manifest import manifest_digest
from arc_ds.cli import main
from arc_ds.config.schema import TrackingConfig
from arc_ds.errors import ConfigError
from arc_ds.inference.load import source_checkpoint
from arc_ds.launch.exit_codes import EXIT_USER_ERROR
from arc_ds.tracking.checkpoint_models import find_checkpoints
from arc_ds.tracking.mlflow_server import RunFacts, start_tracker
from arc_ds.tracking.registration import find_mlflow_run
from tests.helpers.tiny_export import tiny_trained
from tests.helpers.zero_checkpoint import write_zero_checkpoint

TEXTS = ["The wind came from the sea.", "A lamp."]
FRESH = """
import json, sys
import mlflow, pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
model, texts = mlflow.pyfunc.load_model(sys.argv[2]), json.loads(sys.argv[3])
found = [model.predict(texts), model.predict(pd.DataFrame({"text": texts})), model.predict(texts, {"marker": "none"})]
print(json.dumps([table.to_dict("records") for table in found]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in MLflow that has ended, with a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        folder = tmp_path_factory.mktemp("registered") / "run"
        tracker = start_tracker(folder, TrackingConfig(experiment="tests"), RunFacts(params={}), resumed_step=0)
        tracker.log(1, {"train/loss": 2.0})
        assert tracker.close("KILLED", timeout_s=120)
    write_zero_checkpoint(folder, tiny_trained(folder), 2)
    return folder


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def _client(run: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{run.parent}/mlflow.db")


def test_a_registered_model_compresses_in_a_fresh_process(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    uri, run_id = find_mlflow_run(run, None)
    client, out = _client(run), tmp_path / "out"
    before = client.get_run(run_id)
    meanwhile: list[str] = []
    save = mlflow.pyfunc.save_model

    def save_model(**arguments: Any) -> None:
        meanwhile.append(client.get_run(run_id).info.status)
        save(**arguments)

    monkeypatch.setattr(mlflow.pyfunc, "save_model", save_model)
    assert main(["export", str(run), str(out), "--register", "tiny"]) == 0
    assert meanwhile == ["KILLED"], "a kill would leave the run with another status"
    (logged,) = client.search_logged_models([before.info.experiment_id])
    assert logged.source_run_id == run_id
    assert "registered as version 1 of tiny: models:/tiny/1" in capsys.readouterr().out
    after = client.get_run(run_id)
    assert (after.info.status, after.info.end_time) == (before.info.status, before.info.end_time) != ("RUNNING", None)
    assert after.data.metrics == before.data.metrics
    assert client.get_model_version("tiny", "1").run_id == run_id
    command = [sys.executable, "-c", FRESH, uri, "models:/tiny/1", json.dumps(TEXTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    of_list, of_frame, bare = json.loads(done.stdout.splitlines()[-1])
    assert of_list == of_frame != bare
    model = ArcModel.from_checkpoint(out, decoders=[])
    for rows, marker in ((of_list, "cont"), (bare, None)):
        for row, expected in zip(rows, model.compress(TEXTS, marker=marker), strict=True):
            found = np.frombuffer(base64.b64decode(row["vectors"]), "<f4").reshape(row["rows"], row["width"])
            assert np.allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)
            assert np.abs(found).max() > 0.01


def test_what_mlflow_refuses_is_one_error_and_the_export_stays(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), str(tmp_path / "out"), "--register", "a/b:c"]) == EXIT_USER_ERROR
    assert "is whole, but cannot be registered as 'a/b:c'" in capsys.readouterr().err
    assert main(["export", "--verify", str(tmp_path / "out")]) == 0
    (checkpoint,) = find_checkpoints(run)
    assert source_checkpoint(tmp_path / "out") == checkpoint.digest == manifest_digest(checkpoint.path), "for lineage"
    config = tmp_path / "out" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "checkpoint": None}))
    assert source_checkpoint(tmp_path / "out") is None, "as for an earlier export"
    assert _client(run).get_run(find_mlflow_run(run, None)[1]).info.status == "KILLED"


def test_a_moved_run_has_its_database_with_it(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "runs" / "moved"
    moved.mkdir(parents=True)
    state = json.loads((run / "tracking_state.json").read_text())
    state["uri"] = f"sqlite:///{tmp_path}/gone/mlflow.db"
    (moved / "tracking_state.json").write_text(json.dumps(state))
    for place in (moved.parent, moved):  # with all runs of its folder, and with a database of its own
        (place / "mlflow.db").write_bytes((run.parent / "mlflow.db").read_bytes())
        assert find_mlflow_run(moved, None)[0] == f"sqlite:///{place}/mlflow.db"
    for place in (moved.parent, moved):
        (place / "mlflow.db").unlink()
    with pytest.raises(ConfigError, match=r"gone/mlflow.db, the MLflow database of the run in .* does not exist"):
        find_mlflow_run(moved, None)
    state |= {"uri": "http://host:1", "run_id": None}
    (moved / "tracking_state.json").write_text(json.dumps(state))
    with pytest.raises(ConfigError, match="http://host:1 has never answered"):
        find_mlflow_run(moved, None)


def test_the_password_comes_from_the_config_or_the_environment(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = json.loads((run / "tracking_state.json").read_text()) | {"uri": "http://host:1"}
    (tmp_path / "tracking_state.json").write_text(json.dumps(state))
    assert find_mlflow_run(tmp_path, "http://user:secret@host:1")[0] == "http://user:secret@host:1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other:2")
    assert find_mlflow_run(tmp_path, "http://user:secret@host:1")[0] == "http://host:1"


def test_a_run_without_mlflow_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_zero_checkpoint(tmp_path / "run", tiny_trained(tmp_path / "run"), 1)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--register", "tiny"]) == EXIT_USER_ERROR
    assert "records no MLflow run" in capsys.readouterr().err and not (tmp_path / "out").exists()

"""Runs in a real MLflow store: found by id, name and experiment, and read with all their points."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from arc_ds.comparison import mlflow_points
from arc_ds.comparison.find import find_inputs, find_store
from arc_ds.comparison.mlflow_runs import Store, find_run, log_files, open_store, read_runs, runs_of_experiment
from arc_ds.errors import ConfigError, DataError, StorageError

EXPERIMENT = "sweep"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with the runs a, b, twice `twin`, `gone` (deleted) and `bare` (no metrics)."""
    from mlflow import MlflowClient
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment(EXPERIMENT, artifact_location=(folder / "artifacts").as_uri())
    for name, rate in (("a", 0.1), ("b", 0.2), ("twin", 0.3), ("twin", 0.4), ("gone", 0.5), ("bare", 0.6)):
        run_id = client.create_run(experiment, run_name=name).info.run_id
        client.log_batch(run_id, params=[Param("optimizer.encoder_lr", str(rate)), Param("deepspeed", "ds.json")])
        if name == "bare":
            continue
        points = [Metric("train/loss", 3.0 - step, 1000 * step, step) for step in range(3)]
        # A repeated step, NaN, infinity, and a metric of hosts whose steps are samples.
        points += [
            Metric("train/loss", 7.0, 9000, 1),
            Metric("train/norm", math.nan, 1000, 1),
            Metric("train/norm", -math.inf, 2000, 2),
            Metric("system/cpu_utilization_percentage", 5.0, 1000, 500),
        ]
        client.log_batch(run_id, metrics=points)
        client.log_text(run_id, '{"zero_optimization": {"stage": 3}}', "deepspeed.json")
        data = Dataset("train", "d" * 36, "local", "shards/train")
        client.log_inputs(run_id, datasets=[DatasetInput(data, [InputTag("mlflow.data.context", "training")])])
        client.set_tag(run_id, "host", "n1")
        client.set_tag(run_id, "changed.optimizer.encoder_lr", str(rate + 1)) if name == "b" else None
        client.set_terminated(run_id)
        if name == "gone":
            client.delete_run(run_id)
    return open_store(uri)


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("MLFLOW_TRACKING_URI", "RUNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    yield


def test_an_experiment_gives_its_runs_without_deleted_ones(store: Store) -> None:
    assert [run.info.run_name for run in runs_of_experiment(store, EXPERIMENT)] == ["a", "b", "twin", "twin", "bare"]


def test_a_run_has_points_config_digests_and_facts(store: Store) -> None:
    a, b, bare = read_runs(store, [find_run(store, name) for name in ("a", "b", "bare")])
    assert a.curves["train/loss"].steps.tolist() == [0, 1, 2]
    assert a.curves["train/loss"].values.tolist() == [3.0, 7.0, 1.0]  # the later point of step 1
    norm = a.curves["train/norm"].values
    assert math.isnan(norm[0]) and norm[1] == -math.inf
    assert a.curves.keys() == {"train/loss", "train/norm"} and a.last_step == 2
    assert a.clock.values.tolist() == [0.0, 1.0, 2.0], "a later point of a step, as of an evaluation, moves no clock"
    assert a.config == {
        "optimizer.encoder_lr": "0.1",
        "deepspeed.zero_optimization.stage": "3",
        "digest.train": "d" * 36,
    }
    assert b.config["optimizer.encoder_lr"] == "1.2"  # a resumed run changed it
    assert a.facts == {"status": "FINISHED", "host": "n1"}
    assert bare.curves == {} and bare.notes == ("It has no metrics.",)


def test_sql_and_the_client_read_the_same(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run = find_run(store, "a")
    (by_sql,) = read_runs(store, [run])
    monkeypatch.setattr(mlflow_points, "sqlite_database", lambda uri: None)
    (by_client,) = read_runs(store, [run])
    assert by_client.config == by_sql.config and by_client.curves.keys() == by_sql.curves.keys()
    for name, (steps, values) in by_sql.curves.items():
        assert by_client.curves[name].steps.tolist() == steps.tolist()
        assert repr(by_client.curves[name].values.tolist()) == repr(values.tolist())
    assert by_client.clock.values.tolist() == by_sql.clock.values.tolist()


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 7, 100])
def test_full_answers_of_a_server_lose_no_point(store: Store, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """A server answers for several runs, sorted by run and time, up to a number of points."""
    runs = runs_of_experiment(store, EXPERIMENT)
    by_sql = read_runs(store, runs)
    requests = []

    def answer(uri: str, key: str, run_ids: list[str]) -> list[dict[str, object]]:
        requests.append(key)
        points = [
            {"run_id": run_id, "step": point.step, "value": point.value, "timestamp": point.timestamp}
            for run_id in sorted(run_ids)
            for point in sorted(store.client.get_metric_history(run_id, key), key=lambda point: point.timestamp)
        ]
        return points[:limit]

    monkeypatch.setattr(mlflow_points, "_request", answer)
    monkeypatch.setattr(mlflow_points, "_POINTS_PER_REQUEST", limit)
    monkeypatch.setattr(mlflow_points, "sqlite_database", lambda uri: None)
    for one, other in zip(by_sql, read_runs(store, runs), strict=True):
        assert repr(one) == repr(other)
    assert limit < 100 or len(requests) == 2, "one request for each metric"


def test_a_store_that_fails_is_an_error_with_a_remedy(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("gone")

    run = find_run(store, "a")
    for name in ("get_experiment_by_name", "search_runs", "get_run"):
        monkeypatch.setattr(type(store.client), name, fail)
    for call in (
        lambda: runs_of_experiment(store, EXPERIMENT),
        lambda: find_run(store, "a"),
        lambda: find_run(store, "0" * 32),
    ):
        with pytest.raises(StorageError, match=r"cannot be read at sqlite.*ConnectionError: gone\. Try again when"):
            call()
    monkeypatch.setattr(mlflow_points, "_by_sql", fail)
    with pytest.raises(StorageError, match="cannot be read at sqlite"):
        read_runs(store, [run])


def test_a_damaged_database_is_named_at_once(store: Store, tmp_path: Path) -> None:
    """MLflow itself would try for 100 s."""
    (tmp_path / "text.db").write_text("no database" * 100)
    whole = Path(store.uri.removeprefix("sqlite:///")).read_bytes()
    (tmp_path / "half.db").write_bytes(whole[: len(whole) // 2])
    started = time.monotonic()
    for name, words in (("text", "not a database. Correct tracking.uri"), ("half", "malformed. Restore that file")):
        with pytest.raises(StorageError, match=f"answers at sqlite.*{words}"):
            open_store(f"sqlite:///{tmp_path}/{name}.db")
    assert time.monotonic() - started < 60


def test_runs_that_cannot_be_found_are_named_with_a_remedy(store: Store) -> None:
    from mlflow.entities import ViewType

    (experiment,) = [each for each in store.client.search_experiments() if each.name == EXPERIMENT]
    (gone,) = store.client.search_runs([experiment.experiment_id], run_view_type=ViewType.DELETED_ONLY)
    with pytest.raises(DataError, match=f"{gone.info.run_id} was deleted. Restore it .mlflow runs restore --run-id"):
        find_run(store, gone.info.run_id)
    with pytest.raises(DataError, match="has no run 0{32}: it was deleted for good"):
        find_run(store, "0" * 32)
    with pytest.raises(DataError, match="2 runs have the name 'twin'. Give the ids"):
        find_run(store, "twin")
    with pytest.raises(DataError, match="'twn' is neither a folder here nor a run in .* Nearest runs: twin"):
        find_run(store, "twn")
    with pytest.raises(DataError, match="has no experiment 'swep'. Nearest experiments: sweep"):
        runs_of_experiment(store, "swep")


def test_the_name_of_a_run_may_have_quotes(store: Store) -> None:
    run_id = find_run(store, "bare").info.run_id
    for name in ("it's", '"it\'s"', "bare"):
        store.client.update_run(run_id, name=name)
        assert find_run(store, name).info.run_id == run_id


def test_names_of_folders_and_of_runs_may_be_mixed(store: Store, tmp_path: Path) -> None:
    from tests.helpers.compared_runs import write_run

    write_run(tmp_path / "mine", {"train/loss": {1: 1.0}}, {"seed": 1})
    inputs = find_inputs(["b", "mine", "b"], None, store.uri)
    assert [run.name for run in inputs.runs] == ["b", "mine"]
    state = {"run_id": find_run(store, "b").info.run_id}
    (tmp_path / "mine" / "tracking_state.json").write_text(json.dumps(state))
    assert [run.source for run in find_inputs(["b", "mine"], None, store.uri).runs] == ["mine"], "it is the same run"


def test_the_store_is_found_in_the_folder_of_the_runs(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"no MLflow store was found \(looked for mlflow.db, runs/mlflow.db\)"):
        find_store(None)
    with pytest.raises(DataError, match="no folder 'typo' exists here, and no MLflow store"):
        find_inputs(["typo"], None, None)
    database = Path(store.uri.removeprefix("sqlite:///"))
    assert find_store(str(database)).uri == find_store(str(database.parent)).uri == store.uri  # a path is enough
    monkeypatch.setenv("RUNS", str(database.parent))
    assert find_store(None).uri == store.uri
    monkeypatch.delenv("RUNS")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(database))
    assert find_store(None).uri == store.uri
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (tmp_path / "mlflow.db").touch()  # left by SQLite
    (tmp_path / "runs" / "old").mkdir(parents=True)
    (tmp_path / "runs" / "old" / "mlflow.db").touch()
    with pytest.raises(ConfigError, match="Each run in runs has a store of its own: compare the folders of the runs"):
        find_store(None)
    for gone in ("/nowhere/gone.db", str(tmp_path / "mlflow.db")):
        with pytest.raises(StorageError, match="db, the MLflow database to read, does not exist or is empty"):
            open_store(f"sqlite:///{gone}")


def test_the_page_becomes_an_artifact(store: Store, tmp_path: Path) -> None:
    run_id = find_run(store, "a").info.run_id
    (tmp_path / "comparison.html").write_text("page")
    log_files(store, run_id, [tmp_path / "comparison.html"], "comparison")
    assert [each.path for each in store.client.list_artifacts(run_id, "comparison")] == ["comparison/comparison.html"]
    assert store.client.get_run(run_id).info.status == "FINISHED"

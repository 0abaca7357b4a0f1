"""Runs in a real MLflow store: found by id, name and experiment, and read with all their points."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

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
    assert a.clock.values.tolist() == [0.0, 9.0, 2.0]
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
    monkeypatch.setattr("arc_ds.comparison.mlflow_runs.sqlite_database", lambda uri: None)
    (by_client,) = read_runs(store, [run])
    assert by_client.config == by_sql.config and by_client.curves.keys() == by_sql.curves.keys()
    for name, (steps, values) in by_sql.curves.items():
        assert by_client.curves[name].steps.tolist() == steps.tolist()
        assert repr(by_client.curves[name].values.tolist()) == repr(values.tolist())
    assert by_client.clock.values.tolist() == by_sql.clock.values.tolist()


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


def test_names_of_folders_and_of_runs_may_be_mixed(store: Store, tmp_path: Path) -> None:
    from tests.helpers.compared_runs import write_run

    write_run(tmp_path / "mine", {"train/loss": {1: 1.0}}, {"seed": 1})
    inputs = find_inputs(["b", "mine", "b"], None, store.uri)
    assert [run.name for run in inputs.runs] == ["b", "mine"]


def test_the_store_is_found_in_the_folder_of_the_runs(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"no MLflow store was found \(looked for mlflow.db, runs/mlflow.db\)"):
        find_store(None)
    with pytest.raises(DataError, match="no folder 'typo' exists here, and no MLflow store"):
        find_inputs(["typo"], None, None)
    database = Path(store.uri.removeprefix("sqlite:///"))
    assert find_store(str(database)).uri == store.uri  # a path is enough
    monkeypatch.setenv("RUNS", str(database.parent))
    assert find_store(None).uri == store.uri
    with pytest.raises(StorageError, match="gone.db, the MLflow database to read, does not exist"):
        find_store("sqlite:////nowhere/gone.db")


def test_the_page_becomes_an_artifact(store: Store, tmp_path: Path) -> None:
    run_id = find_run(store, "a").info.run_id
    (tmp_path / "comparison.html").write_text("page")
    log_files(store, run_id, [tmp_path / "comparison.html"], "comparison")
    assert [each.path for each in store.client.list_artifacts(run_id, "comparison")] == ["comparison/comparison.html"]
    assert store.client.get_run(run_id).info.status == "FINISHED"

"""Results of evaluations in MLflow: a table of samples and the scores of tasks, in the run that trained the model."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from arc_ds.tracking.checkpoint_models import EVALUATION, link_to_source, model_of_step, models_of_digest
from arc_ds.tracking.database import artifact_folder, open_client
from arc_ds.tracking.faults import explained
from arc_ds.tracking.mlflow_server import DIGEST_CHARS, SOURCE_TAG, STAGE_TAG, allowed_name, experiment_of
from arc_ds.tracking.uris import sqlite_database

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

_PER_BATCH = 1000


def log_evaluation(
    uri: str,
    run_id: str,
    *,
    table: Mapping[str, Sequence[Any]],
    metrics: Mapping[str, Mapping[str, float]],
    step: int,
    name: str = "samples",
    datasets: Mapping[str, str] | None = None,
) -> str:
    """Log the results of an evaluation into an MLflow run. Its status stays. Returns the table's artifact path.

    If the run has the checkpoint of this step as a model, the metrics belong to that model, too. The same results may
    be logged again: nothing is doubled.

    uri: tracking URI. `registration.find_mlflow_run` gives it, and the run, for a run's folder.
    run_id: MLflow's id of the run.
    table: columns of equal length, for example `id`, `task`, `prediction`. The values are JSON values.
    metrics: value by metric name, by task; logged as `eval/TASK/METRIC`.
    step: of the checkpoint.
    name: of the table, without a slash.
    datasets: digest of each task's data, by task.

    Raises ConfigError if the server cannot be reached or refuses the results.
    """
    with explained(uri, f"the results of the evaluation cannot be logged in the MLflow run {run_id}"):
        client = open_client(uri)
        path = _log_table(client, run_id, table, f"evaluation/step_{step:06d}/{name}")
        model = model_of_step(client, run_id, step)
        points = list(_points(metrics, step, None if model is None else model.model_id, datasets or {}))
        new = [point for point in points if not _is_there(client, run_id, point)]
        for start in range(0, len(new), _PER_BATCH):
            client.log_batch(run_id, metrics=new[start : start + _PER_BATCH])
    return path


def create_evaluation_run(uri: str, *, experiment: str, name: str, source_checkpoint: str | None = None) -> str:
    """Create an MLflow run for an evaluation that belongs to no training run, and return its id.

    The run has ended from its start, so a kill leaves none that seems to go on. Results may be logged all the same.

    name: of the run, for example that of the evaluated system.
    source_checkpoint: digest of the evaluated checkpoint, if there is one. The run that wrote it becomes the parent.

    Raises ConfigError like `log_evaluation`.
    """
    with explained(uri, f"no MLflow run {name!r} can be created"):
        client, database = open_client(uri), sqlite_database(uri)
        place = None if database is None else artifact_folder(database).as_uri()
        tags = {STAGE_TAG: "evaluation", **({} if source_checkpoint is None else {SOURCE_TAG: source_checkpoint})}
        run = client.create_run(experiment_of(client, experiment, place), run_name=name, tags=tags)
        client.set_terminated(run.info.run_id, "FINISHED")
        if source_checkpoint is not None:
            link_to_source(client, run.info.run_id, source_checkpoint)
        return str(run.info.run_id)


def find_run_of_checkpoint(uri: str, digest: str) -> tuple[str, int] | None:
    """Id of the MLflow run that wrote a checkpoint, and the checkpoint's step; None if the store does not know it.

    digest: of the checkpoint's manifest. An export records it (`inference.load.source_checkpoint`).

    Raises ConfigError like `log_evaluation`.
    """
    with explained(uri, "the run of the checkpoint cannot be found"):
        for model in models_of_digest(open_client(uri), digest):
            if model.source_run_id is not None:
                return str(model.source_run_id), int(model.name.removeprefix("step_"))
    return None


def _log_table(client: MlflowClient, run_id: str, table: Mapping[str, Sequence[Any]], stem: str) -> str:
    """Log a table unless the run has it. Its name ends with its digest, since MLflow would append to an equal name."""
    content = json.dumps({key: list(values) for key, values in table.items()}, sort_keys=True, default=str)
    path = f"{stem}-{hashlib.sha256(content.encode()).hexdigest()[:8]}.json"
    if path not in {each.path for each in client.list_artifacts(run_id, stem.rpartition("/")[0])}:
        client.log_table(run_id, json.loads(content), path)
    return path


def _points(
    metrics: Mapping[str, Mapping[str, float]], step: int, model_id: str | None, datasets: Mapping[str, str]
) -> Iterator[Metric]:
    from mlflow.entities import Metric

    now = round(time.time() * 1000)
    for task, values in metrics.items():
        dataset = (task, datasets[task][:DIGEST_CHARS]) if task in datasets else (None, None)
        for metric, value in values.items():
            key = allowed_name(f"{EVALUATION}{task}/{metric}")
            # MLflow's tables of models have no NaN: it would store 0.
            yield Metric(key, value, now, step, model_id if math.isfinite(value) else None, *dataset)


def _is_there(client: MlflowClient, run_id: str, point: Metric) -> bool:
    """Whether the run has a point with equal key, step and value."""
    history = client.get_metric_history(run_id, point.key)
    return any(
        each.step == point.step and (each.value == point.value or (math.isnan(each.value) and math.isnan(point.value)))
        for each in history
    )

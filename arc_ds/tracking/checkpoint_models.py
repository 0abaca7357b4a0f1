"""Checkpoints of a run as MLflow's LoggedModels: their metrics, and the runs that start from them.

A model holds no files. Its tags name the checkpoint's folder and digest, and its metrics are those of its step. A
later run whose weights come from the checkpoint finds its parent run by the digest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from arc_ds.tracking.database import paged

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric

MODEL_TYPE = "arc-checkpoint"
EVALUATION = "eval/"  # prefix of the metrics of evaluations
DIGEST_TAG = "arc_ds.checkpoint"
PARENT_TAG = "arc_ds.parent_run"
_STEP_TAG, _PATH_TAG = "arc_ds.step", "arc_ds.checkpoint_path"
_MANIFESTS = "checkpoints/step_*/manifest.json"
_STEP_FOLDER = re.compile(r"step_(\d{6,})")
_PER_PAGE = 100


class Checkpoint(NamedTuple):
    """A whole checkpoint of a run.

    step: number of optimizer steps done.
    digest: of its manifest, which has the checksums of all its files.
    path: its folder.
    """

    step: int
    digest: str
    path: Path


def find_checkpoints(folder: Path) -> Iterator[Checkpoint]:
    """The whole checkpoints of a run's folder. One that its run removes meanwhile may be left out."""
    for manifest in sorted(folder.glob(_MANIFESTS)):
        step = _STEP_FOLDER.fullmatch(manifest.parent.name)
        with suppress(OSError):
            digest = _digest(manifest, manifest.stat().st_mtime_ns)
            if step is not None and digest is not None:
                yield Checkpoint(int(step[1]), digest, manifest.parent)


@lru_cache(maxsize=1024)
def _digest(manifest: Path, _changed_ns: int) -> str | None:
    """The digest that a manifest records; None if it is damaged. _changed_ns: time of its last change."""
    try:
        return str(json.loads(manifest.read_text(encoding="utf-8"))["digest"])
    except (ValueError, KeyError, TypeError):
        return None


def logged_checkpoints(client: MlflowClient, run_id: str) -> dict[int, str]:
    """Digests of the run's checkpoints that are models with all their metrics, by step."""
    models = _search(client, [_experiment_of(client, run_id)], f"source_run_id = '{run_id}'")
    return {
        int(model.tags[_STEP_TAG]): model.tags[DIGEST_TAG]
        for model in models
        if model.status == "READY" and _STEP_TAG in model.tags
    }


def model_of_step(client: MlflowClient, run_id: str, step: int) -> LoggedModel | None:
    """The model of a run's checkpoint; None if there is none."""
    wanted = f"source_run_id = '{run_id}' AND name = '{_name(step)}'"
    return next(_search(client, [_experiment_of(client, run_id)], wanted), None)


def models_of_digest(client: MlflowClient, digest: str) -> Iterator[LoggedModel]:
    """The models of a checkpoint in all experiments, oldest first. digest: of the checkpoint's manifest."""
    if digest.isalnum():  # it stands in a query
        experiments = [each.experiment_id for each in paged(client.search_experiments)]
        yield from _search(client, experiments, f"tags.`{DIGEST_TAG}` = '{digest}'")


def log_checkpoint(client: MlflowClient, run_id: str, checkpoint: Checkpoint, metrics: Sequence[Metric]) -> None:
    """Store a checkpoint as a model of its run. Safe to repeat: it is ready only with all its metrics.

    metrics: points that the run has already, with equal times, so that it keeps a single one of each.
    """
    from mlflow.entities import LoggedModelOutput, Metric

    tags = {
        DIGEST_TAG: checkpoint.digest,
        _STEP_TAG: str(checkpoint.step),
        _PATH_TAG: str(checkpoint.path.resolve()),
    }
    model = model_of_step(client, run_id, checkpoint.step)
    if model is None:
        experiment_id, name = _experiment_of(client, run_id), _name(checkpoint.step)
        model = client.create_logged_model(
            experiment_id, name=name, source_run_id=run_id, tags=tags, model_type=MODEL_TYPE
        )
    else:
        client.set_logged_model_tags(model.model_id, tags)
    client.log_batch(
        run_id,
        metrics=[
            Metric(
                *(each.key, each.value, each.timestamp, each.step),
                model_id=model.model_id,
                dataset_name=each.dataset_name,
                dataset_digest=each.dataset_digest,
            )
            for each in metrics
        ],
    )
    outputs = client.get_run(run_id).outputs
    if model.model_id not in {each.model_id for each in (outputs.model_outputs if outputs else ())}:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, checkpoint.step)])
    if model.status != "READY":
        client.finalize_logged_model(model.model_id, "READY")


def link_to_source(client: MlflowClient, run_id: str, digest: str) -> None:
    """Make a run the child of the run that wrote a checkpoint, if the store has that checkpoint as a model.

    digest: of the checkpoint whose weights the run uses.
    """
    from mlflow.entities import LoggedModelInput

    source = next(models_of_digest(client, digest), None)
    if source is None or source.source_run_id in (None, run_id):
        return
    for tag in (PARENT_TAG, "mlflow.parentRunId"):  # the user interface of MLflow shows the second one
        client.set_tag(run_id, tag, source.source_run_id)
    inputs = client.get_run(run_id).inputs
    if source.model_id not in {each.model_id for each in (inputs.model_inputs if inputs else ())}:
        client.log_inputs(run_id, models=[LoggedModelInput(source.model_id)])


def _name(step: int) -> str:
    return f"step_{step:06d}"


def _experiment_of(client: MlflowClient, run_id: str) -> str:
    return str(client.get_run(run_id).info.experiment_id)


def _search(client: MlflowClient, experiment_ids: list[str], wanted: str) -> Iterator[LoggedModel]:
    """All models that fit a filter, oldest first."""
    oldest_first = [{"field_name": "creation_timestamp", "ascending": True}]
    return paged(client.search_logged_models, experiment_ids, wanted, max_results=_PER_PAGE, order_by=oldest_first)

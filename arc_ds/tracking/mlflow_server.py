"""MLflow as the server of a `Tracker`. Importing it is slow, so the tracker's thread does that."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from arc_ds.config.schema import TrackingConfig
from arc_ds.errors import ConfigError
from arc_ds.tracking import checkpoint_models
from arc_ds.tracking.checkpoint_models import Checkpoint
from arc_ds.tracking.database import artifact_folder, make_database, open_client, paged
from arc_ds.tracking.faults import is_refused
from arc_ds.tracking.metrics_log import MetricsEntry
from arc_ds.tracking.tracking import Tracker
from arc_ds.tracking.tracking_state import recorded
from arc_ds.tracking.uris import URI_VARIABLE, resolve_uri, sqlite_database, without_secret
from arc_ds.version import __version__

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_KEY_TAG = "arc_ds.run_key"
FOLDER_TAG = "arc_ds.run_dir"
STAGE_TAG = "arc_ds.stage"
SOURCE_TAG = "arc_ds.source_checkpoint"
# MLflow's limits: items per request, and characters of a parameter value, a tag value and a digest.
_PER_BATCH = {"metrics": 1000, "params": 100, "tags": 100}
PARAM_CHARS = 6000
TAG_CHARS = 5000
DIGEST_CHARS = 36
_DATASET_CHARS = 500
_LONG_PARAMS = "long_parameters.json"
HELD_OUT = "held-out"
_SCORE = re.compile(r"validation/.+/(nll_\w+|gap_closed)")
_FORBIDDEN = re.compile(r"[^/\w.\- :]")
# Launchers by a variable that they set for each rank; the first one that is set counts.
_LAUNCHERS = {"TORCHELASTIC_RUN_ID": "torchrun", "CROSS_RANK": "deepspeed", "SLURM_PROCID": "srun"}
_VERSIONS_OF = ("torch", "deepspeed", "triton", "mlflow", "webdataset", "numpy")


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Description of a run, in addition to its metrics.

    params: the resolved config, flattened.
    artifacts: text by file name (config.yaml, deepspeed.json).
    tags: from `environment_tags`.
    datasets: the training data: digest of the shards' manifest by folder of the shards.
    held_out: digest of the held-out samples; None if there are none.
    source_checkpoint: digest of the checkpoint whose weights the run starts from (`encoder.init_from`), if known.
    """

    params: Mapping[str, Any]
    artifacts: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    datasets: Mapping[str, str] = field(default_factory=dict)
    held_out: str | None = None
    source_checkpoint: str | None = None


def start_tracker(
    folder: Path, config: TrackingConfig, facts: RunFacts, *, resumed_step: int, run_id: str | None = None
) -> Tracker:
    """Start a tracker that sends a run's metrics to MLflow, and return without waiting for the server. For rank 0.

    resumed_step: step of the checkpoint; 0 for a new run.
    run_id: MLflow run id of the checkpoint; None for a new run.
    """
    folder = folder.resolve()
    uri = resolve_uri(folder, config.uri)
    make_server = partial(MlflowServer, uri, config, facts, folder)
    shown = without_secret(uri)
    return Tracker(folder, uri=shown, make_server=make_server, resumed_step=resumed_step, run_id=run_id)


def environment_tags(*, device: str, hosts: Sequence[str], placements: Mapping[str, str]) -> dict[str, str]:
    """Tags for the environment of a run: hosts, device, world size, launcher, placements, git commit, versions.

    device: description of rank 0's device.
    hosts: host of each rank, in rank order.
    placements: placement of each decoder, by name.
    """
    names = list(dict.fromkeys(hosts))
    tags = {
        "host": hosts[0],
        "hosts": ", ".join(names),
        "num_hosts": str(len(names)),
        "world_size": str(len(hosts)),
        "device": device,
        "launcher": next((launcher for name, launcher in _LAUNCHERS.items() if name in os.environ), "none"),
        **{f"placement.{allowed_name(name)}": placement for name, placement in placements.items()},
    }
    if (job := os.environ.get("SLURM_JOB_ID")) is not None:
        tags["slurm_job"] = job
    if (commit := _git_commit()) is not None:
        tags["mlflow.source.git.commit"] = commit
    return {**tags, **{f"version.{name}": found for name, found in package_versions().items()}}


def package_versions() -> dict[str, str]:
    """Versions of Python, ARC-DS and its main dependencies."""
    found = {"python": platform.python_version(), "arc-ds": __version__}
    for package in _VERSIONS_OF:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _git_commit() -> str | None:
    """Git commit of this code's checkout, with `-dirty` if files were changed; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=10).strip() or None
    return None


class MlflowServer:
    """A tracking server: one experiment of a tracking URI. Any method may raise.

    http(s), sqlite and MLflow's other databases are supported; a folder only if MLFLOW_ALLOW_FILE_STORE is set.
    """

    def __init__(self, uri: str, config: TrackingConfig, facts: RunFacts, folder: Path) -> None:
        """Import MLflow and connect. folder: the run's folder; it names the run."""
        self._database = sqlite_database(uri)
        self._client = open_client(uri)
        self._experiment = config.experiment
        self._run_name = config.run_name or folder.name
        self._facts = facts
        self._folder = folder
        self._artifacts = None if self._database is None else artifact_folder(self._database).as_uri()
        self._refused_metrics: set[str] = set()

    def open_run(self, run_key: str, run_id: str | None) -> str:
        """Find a run by MLflow's id or by the run's own key, or create it; mark it as running and return its id.

        A run that was deleted is not found, so it is replaced by a new one. Neither is the run of the folder that this
        one was copied from.
        """
        if self._database is not None:
            make_database(self._database)  # it may have been removed
        experiment_id = experiment_of(self._client, self._experiment, self._artifacts)
        found = self._find_run(experiment_id, run_key, run_id)
        if found is None:
            tags = {_KEY_TAG: run_key, FOLDER_TAG: str(self._folder)}
            return str(self._client.create_run(experiment_id, run_name=self._run_name, tags=tags).info.run_id)
        self._client.update_run(found, status="RUNNING")
        return found

    def describe(self, run_id: str) -> dict[str, Exception]:
        """Write parameters, tags and datasets. Safe to repeat. Returns the parts that could not be stored.

        Parameters changed since the first start become tags.
        MLflow parameters are immutable, but a resumed run may, for example, save more often or use other workers.
        """
        failed: dict[str, Exception] = {}
        for name, write in (
            ("the parameters", self._write_params),
            ("the tags", partial(self._write_tags, tags=self._own_tags())),
            ("the datasets", self._write_datasets),
            ("the link to the run of encoder.init_from", self._write_source),
        ):
            try:
                failed |= write(run_id)
            except Exception as error:  # one part must not keep back the others, or the metrics
                failed[name] = error
        return failed

    def store_artifacts(self, run_id: str) -> dict[str, Exception]:
        """Store the artifacts. Returns those that could not be stored. The artifact store may take minutes to fail."""
        failed: dict[str, Exception] = {}
        long = {key: str(value) for key, value in self._facts.params.items() if len(str(value)) > PARAM_CHARS}
        more = {_LONG_PARAMS: json.dumps(long, indent=1)} if long else {}
        for name, text in {**self._facts.artifacts, **more}.items():
            try:
                self._client.log_text(run_id, text, name)
            except Exception as error:
                failed[name] = error
        return failed

    def steps_of(self, run_id: str, key: str, from_step: int) -> set[int]:
        """Steps >= `from_step` for which the run has a point of `key`."""
        history = self._client.get_metric_history(run_id, allowed_name(key))
        return {point.step for point in history if point.step >= from_step}

    def send(self, run_id: str, entries: list[MetricsEntry]) -> dict[str, Exception]:
        """Store metrics. If the store is a database, sending the same entry twice yields a single point.

        Returns the metrics that MLflow refuses; they are not sent again.
        """
        from mlflow.entities import Metric

        points = [
            (f"metric {key}", Metric(allowed_name(key), value, round(entry.time * 1000), entry.step))
            for entry in entries
            for key, value in entry.metrics.items()
            if f"metric {key}" not in self._refused_metrics
        ]
        refused = self._deliver(run_id, "metrics", points, _PER_BATCH["metrics"])
        self._refused_metrics |= refused.keys()
        return refused

    def logged_checkpoints(self, run_id: str) -> dict[int, str]:
        """Digests of the checkpoints that `log_checkpoint` has stored, by step."""
        return checkpoint_models.logged_checkpoints(self._client, run_id)

    def log_checkpoint(
        self, run_id: str, checkpoint: Checkpoint, entries: Sequence[MetricsEntry], *, are_ours: bool
    ) -> None:
        """Store a checkpoint as a LoggedModel with the losses and scores of its step, each with its dataset.

        entries: the step's metrics, which `send` has stored.
        are_ours: whether all points of the step were sent in this start. Otherwise the server may have those of an
            earlier start, with other times.
        """
        from mlflow.entities import Metric

        points = []
        for entry in entries:
            for key, value in entry.metrics.items():
                dataset = self._dataset_of(key)
                # MLflow's tables of models have no NaN: it would store 0.
                is_about = dataset is not None or key.startswith(checkpoint_models.EVALUATION)
                if not is_about or not math.isfinite(value) or f"metric {key}" in self._refused_metrics:
                    continue
                point = None if are_ours else self._stored_point(run_id, key, entry.step)
                value, time_ms = point or (value, round(entry.time * 1000))
                points.append(Metric(allowed_name(key), value, time_ms, entry.step, None, *(dataset or (None, None))))
        checkpoint_models.log_checkpoint(self._client, run_id, checkpoint, points)

    def _stored_point(self, run_id: str, key: str, step: int) -> tuple[float, int] | None:
        """Value and time of the server's point; None if it has none."""
        history = self._client.get_metric_history(run_id, allowed_name(key))
        return next(((point.value, point.timestamp) for point in history if point.step == step), None)

    def _dataset_of(self, key: str) -> tuple[str, str] | None:
        """Name and digest of the dataset that a metric is about; None for speed, memory and the like."""
        if key.startswith("train/loss") and self._facts.datasets:
            named = [(Path(source).name or source, digest) for source, digest in self._facts.datasets.items()]
            name = "+".join(name for name, _ in named)
            digest = named[0][1] if len(named) == 1 else hashlib.sha256(repr(named).encode()).hexdigest()
            return name[:_DATASET_CHARS], digest[:DIGEST_CHARS]
        if _SCORE.fullmatch(key):
            return None if self._facts.held_out is None else (HELD_OUT, self._facts.held_out[:DIGEST_CHARS])
        return None

    def end_run(self, run_id: str, status: str) -> None:
        """Mark the run as ended: FINISHED, FAILED or KILLED."""
        self._client.set_terminated(run_id, status=status)

    def _write_params(self, run_id: str) -> dict[str, Exception]:
        from mlflow.entities import Param

        whole = {allowed_name(key): str(value) for key, value in self._facts.params.items()}
        params = {key: _shortened(value) for key, value in whole.items()}
        stored = self._client.get_run(run_id).data
        known, tags = stored.params, stored.tags
        new = [(f"parameter {key}", Param(key, value)) for key, value in params.items() if key not in known]
        changed = {
            f"changed.{key}": value
            for key, value in params.items()
            # Earlier versions left out the note. A parameter may also have its first value again.
            if known.get(key, value) not in (value, whole[key][:PARAM_CHARS]) or f"changed.{key}" in tags
        }
        refused = self._deliver(run_id, "params", new, _PER_BATCH["params"])
        return refused | self._write_tags(run_id, changed)

    def _write_tags(self, run_id: str, tags: Mapping[str, str]) -> dict[str, Exception]:
        from mlflow.entities import RunTag

        items = [(f"tag {key}", RunTag(key, value[:TAG_CHARS])) for key, value in tags.items()]
        return self._deliver(run_id, "tags", items, _PER_BATCH["tags"])

    def _own_tags(self) -> dict[str, str]:
        stage = "pretraining" if self._facts.params.get("encoder.init_from") is None else "fine-tuning"
        source = self._facts.source_checkpoint
        ours = {FOLDER_TAG: str(self._folder), STAGE_TAG: stage, **({} if source is None else {SOURCE_TAG: source})}
        return {**self._facts.tags, **ours}

    def _write_datasets(self, run_id: str) -> dict[str, Exception]:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        failed: dict[str, Exception] = {}
        inputs = [
            ("training", Path(source).name or source, digest, source) for source, digest in self._facts.datasets.items()
        ]
        if self._facts.held_out is not None:
            inputs.append(("validation", HELD_OUT, self._facts.held_out, "data.validation"))
        for context, name, digest, source in inputs:
            dataset = Dataset(name, digest[:DIGEST_CHARS], "local", source)
            tags = [InputTag("mlflow.data.context", context)]
            try:
                self._client.log_inputs(run_id, datasets=[DatasetInput(dataset, tags=tags)])
            except Exception as error:
                failed[f"dataset {source}"] = error
        return failed

    def _write_source(self, run_id: str) -> dict[str, Exception]:
        if (digest := self._facts.source_checkpoint) is not None:
            checkpoint_models.link_to_source(self._client, run_id, digest)
        return {}

    def _deliver(
        self, run_id: str, kind: Literal["metrics", "params", "tags"], items: list[tuple[str, Any]], size: int
    ) -> dict[str, Exception]:
        """Store items in batches of `size`. Returns those that MLflow refuses, by name; the others are stored."""
        refused: dict[str, Exception] = {}
        for start in range(0, len(items), size):
            part = items[start : start + size]
            batch: dict[str, Any] = {kind: [item for _, item in part]}
            try:
                self._client.log_batch(run_id, **batch)
            except Exception as error:
                if not is_refused(error):
                    raise
                if self._client.get_run(run_id).info.lifecycle_stage != "active":
                    raise  # not the content, but the run: it was deleted
                if len(part) > 1:
                    refused |= self._deliver(run_id, kind, part, len(part) // 2)
                else:
                    refused[part[0][0]] = error
        return refused

    def _find_run(self, experiment_id: str, run_key: str, run_id: str | None) -> str | None:
        from mlflow.exceptions import MlflowException

        if run_id is not None:
            try:
                run = self._client.get_run(run_id)
                if run.info.lifecycle_stage == "active" and not self._is_of_original(run):
                    return run_id
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST" and not is_refused(error):  # refused: no id of MLflow
                    raise
        runs = paged(self._client.search_runs, [experiment_id], f"tags.`{_KEY_TAG}` = '{run_key}'")
        return next((str(run.info.run_id) for run in runs if not self._is_of_original(run)), None)

    def _is_of_original(self, run: Run) -> bool:
        """Whether a run belongs to another folder, which this one was copied from. A moved folder leaves none."""
        other = Path(run.data.tags.get(FOLDER_TAG, self._folder))
        with suppress(OSError):
            return recorded(other, "run_id") == run.info.run_id and not other.samefile(self._folder)
        return False


def experiment_of(client: MlflowClient, name: str, artifacts: str | None) -> str:
    """Id of an experiment, which is created if it does not exist.

    artifacts: URI of its artifacts; None for the server's default.

    Raises ConfigError if the experiment was deleted.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except MlflowException:
            # Another run may have created it in the meantime. If not, the next line raises the actual error.
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise ConfigError(
            f"the experiment {name!r} was deleted on the tracking server, so MLflow accepts no run in it. Restore it "
            f"(mlflow experiments restore --experiment-id {found.experiment_id}, with {URI_VARIABLE} set), or set "
            "tracking.experiment to another name."
        )
    return str(found.experiment_id)


def allowed_name(name: str) -> str:
    """A name with the characters that MLflow allows in names of metrics and parameters."""
    return _FORBIDDEN.sub("_", name)


def _shortened(value: str) -> str:
    """A parameter within MLflow's limit, with a note if a part is left out."""
    if len(value) <= PARAM_CHARS:
        return value
    note = f"... [{len(value)} characters, whole in {_LONG_PARAMS}]"
    return value[: PARAM_CHARS - len(note)] + note

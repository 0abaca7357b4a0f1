"""MLflow as the server of a `Tracker`. Importing it is slow, so the tracker's thread does that."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from arc_ds.config.schema import TrackingConfig
from arc_ds.system.user_paths import user_path
from arc_ds.tracking.metrics_log import MetricsEntry
from arc_ds.tracking.tracking import Tracker
from arc_ds.version import __version__

T = TypeVar("T")

URI_VARIABLE = "MLFLOW_TRACKING_URI"
_SQLITE = "sqlite:///"
_KEY_TAG = "arc_ds.run_key"
# MLflow's limits: items per request, and characters of a parameter value, a tag value and a digest.
_PARAMS_PER_BATCH = 100
_METRICS_PER_BATCH = 1000
_PARAM_CHARS = 6000
_TAG_CHARS = 5000
_DIGEST_CHARS = 36
_VERSIONS_OF = ("torch", "deepspeed", "triton", "mlflow", "webdataset", "numpy")
# By default MLflow waits 120 s and tries 8 times; a dead server would block the thread for a quarter of an hour. It
# also sends usage telemetry by default.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Description of a run, in addition to its metrics.

    params: the resolved config, flattened.
    artifacts: text by file name (config.yaml, deepspeed.json).
    tags: from `environment_tags`.
    datasets: the training data: digest of the shards' manifest by folder of the shards.
    """

    params: Mapping[str, Any]
    artifacts: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    datasets: Mapping[str, str] = field(default_factory=dict)


def start_tracker(
    folder: Path, config: TrackingConfig, facts: RunFacts, *, resumed_step: int, run_id: str | None = None
) -> Tracker:
    """Start a tracker that sends a run's metrics to MLflow. For rank 0. Returns immediately.

    resumed_step: step of the checkpoint; 0 for a new run.
    run_id: MLflow run id of the checkpoint; None for a new run.
    """
    folder = folder.resolve()
    uri = resolve_uri(folder, config.uri)
    make_server = partial(MlflowServer, uri, config, facts, folder)
    return Tracker(folder, uri=without_secret(uri), make_server=make_server, resumed_step=resumed_step, run_id=run_id)


def resolve_uri(folder: Path, configured: str | None) -> str:
    """The tracking URI from the environment, else from the config, else sqlite in the run's folder."""
    return user_path(os.environ.get(URI_VARIABLE, "")) or configured or f"sqlite:///{folder.resolve() / 'mlflow.db'}"


def without_secret(uri: str) -> str:
    """The URI without user and password, for logs and files."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def environment_tags(*, device: str, world_size: int) -> dict[str, str]:
    """Tags for the environment of a run: host, device description, world size, git commit, versions."""
    tags = {"host": socket.gethostname(), "device": device, "world_size": str(world_size)}
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
    """A tracking server: one experiment of a tracking URI (http, sqlite or a folder). Any method may raise."""

    def __init__(self, uri: str, config: TrackingConfig, facts: RunFacts, folder: Path) -> None:
        """Import MLflow and connect. folder: the run's folder; it stores artifacts if the URI is a local database."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        if uri.startswith(_SQLITE) and "?" not in uri:
            database = Path(uri.removeprefix(_SQLITE))
            if database.parent == folder:  # in any other folder the leftovers may belong to a running process
                for leftover in folder.glob(f".{database.name}-*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            _make_database(database)
        self._client = MlflowClient(tracking_uri=uri)
        self._experiment = config.experiment
        self._run_name = config.run_name or folder.name
        self._facts = facts
        # With a database, MLflow would otherwise store artifacts in ./mlruns of the current folder.
        self._artifacts = (folder / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None

    def open_run(self, run_key: str, run_id: str | None) -> str:
        """Find a run by MLflow's id or by the run's own key, or create it; mark it as running and return its id."""
        experiment_id = self._experiment_id()
        found = self._find_run(experiment_id, run_key, run_id)
        if found is None:
            tags = {_KEY_TAG: run_key, **self._facts.tags}
            return str(self._client.create_run(experiment_id, run_name=self._run_name, tags=tags).info.run_id)
        self._client.update_run(found, status="RUNNING")
        return found

    def describe(self, run_id: str) -> None:
        """Write parameters, tags, datasets and artifacts. Safe to repeat.

        Parameters changed since the first start become tags.
        MLflow parameters are immutable, but a resumed run may, for example, save more often or use other workers.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        params = {key: str(value)[:_PARAM_CHARS] for key, value in self._facts.params.items()}
        known = self._client.get_run(run_id).data.params
        new = [Param(key, value) for key, value in params.items() if key not in known]
        changed = {f"changed.{key}": value for key, value in params.items() if known.get(key, value) != value}
        for part in _parts(new, _PARAMS_PER_BATCH):
            self._client.log_batch(run_id, params=part)
        tags = [RunTag(key, value[:_TAG_CHARS]) for key, value in {**self._facts.tags, **changed}.items()]
        for tag_part in _parts(tags, _PARAMS_PER_BATCH):
            self._client.log_batch(run_id, tags=tag_part)
        inputs = [
            DatasetInput(
                Dataset(Path(source).name, digest[:_DIGEST_CHARS], "local", source),
                tags=[InputTag("mlflow.data.context", "training")],
            )
            for source, digest in self._facts.datasets.items()
        ]
        if inputs:
            self._client.log_inputs(run_id, datasets=inputs)
        for name, text in self._facts.artifacts.items():
            self._client.log_text(run_id, text, name)

    def steps_of(self, run_id: str, key: str, from_step: int) -> set[int]:
        """Steps >= `from_step` for which the run has a point of `key`."""
        return {point.step for point in self._client.get_metric_history(run_id, key) if point.step >= from_step}

    def send(self, run_id: str, entries: list[MetricsEntry]) -> None:
        """Store metrics. If the store is a database, sending the same entry twice yields a single point."""
        from mlflow.entities import Metric

        points = [
            Metric(key, value, round(entry.time * 1000), entry.step)
            for entry in entries
            for key, value in entry.metrics.items()
        ]
        for part in _parts(points, _METRICS_PER_BATCH):
            self._client.log_batch(run_id, metrics=part)

    def end_run(self, run_id: str, status: str) -> None:
        """Mark the run as ended: FINISHED, FAILED or KILLED."""
        self._client.set_terminated(run_id, status=status)

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(self._experiment)
        if found is None:
            try:
                return str(self._client.create_experiment(self._experiment, artifact_location=self._artifacts))
            except MlflowException:
                # Another run may have created it in the meantime. If not, the next line raises the actual error.
                found = self._client.get_experiment_by_name(self._experiment)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _find_run(self, experiment_id: str, run_key: str, run_id: str | None) -> str | None:
        from mlflow.exceptions import MlflowException

        if run_id is not None:
            try:
                if self._client.get_run(run_id).info.lifecycle_stage == "active":
                    return run_id
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        runs = self._client.search_runs([experiment_id], f"tags.`{_KEY_TAG}` = '{run_key}'", max_results=1)
        return str(runs[0].info.run_id) if runs else None


def _make_database(path: Path) -> None:
    """Create MLflow's database file atomically if it does not exist.

    MLflow needs seconds to create its tables, and it can neither use nor repair a database left by a kill.
    """
    from mlflow import MlflowClient

    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        made = Path(folder) / path.name
        MlflowClient(tracking_uri=f"{_SQLITE}{made}").search_experiments(max_results=1)
        with suppress(FileExistsError):  # another run created it in the meantime
            os.link(made, path)


def _parts(items: list[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]

"""MLflow as the server of a `Tracker`. Importing it is slow, so the tracker's thread does that."""

from __future__ import annotations

import glob
import logging
import os
import platform
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from arc_ds.config.schema import TrackingConfig
from arc_ds.errors import ConfigError
from arc_ds.tracking.faults import is_refused
from arc_ds.tracking.metrics_log import MetricsEntry
from arc_ds.tracking.tracking import Tracker
from arc_ds.tracking.uris import (
    URI_VARIABLE,
    resolve_uri,
    sqlite_database,
    sqlite_uri,
    without_secret,
)
from arc_ds.version import __version__

_KEY_TAG = "arc_ds.run_key"
# MLflow's limits: items per request, and characters of a parameter value, a tag value and a digest.
_PER_BATCH = {"metrics": 1000, "params": 100, "tags": 100}
_PARAM_CHARS = 6000
_TAG_CHARS = 5000
_DIGEST_CHARS = 36
_FORBIDDEN = re.compile(r"[^/\w.\- :]")
# Launchers by a variable that they set for each rank; the first one that is set counts.
_LAUNCHERS = {"TORCHELASTIC_RUN_ID": "torchrun", "CROSS_RANK": "deepspeed", "SLURM_PROCID": "srun"}
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
        **{f"placement.{_allowed_name(name)}": placement for name, placement in placements.items()},
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
        set_environment()
        if self._database is not None:
            # With a pool, MLflow would keep writing to the file of a database that was removed or replaced.
            os.environ.setdefault("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "NullPool")
            uri = for_mlflow(uri)
            if self._database.parent == folder:  # in any other folder the leftovers may belong to a running process
                for leftover in folder.glob(f".{glob.escape(self._database.name)}-*"):
                    shutil.rmtree(leftover, ignore_errors=True)
        with home():
            from mlflow import MlflowClient
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it reports each pool and table
        if self._database is not None:
            _make_database(self._database)
        self._client = MlflowClient(tracking_uri=uri)
        self._experiment = config.experiment
        self._run_name = config.run_name or folder.name
        self._facts = facts
        # With a database, MLflow would otherwise store artifacts in ./mlruns of the current folder. They lie beside the
        # database, because all runs of an experiment share its place: the folder of one run must not hold the others'.
        self._artifacts = None if self._database is None else (self._database.parent / "mlartifacts").as_uri()
        self._refused_metrics: set[str] = set()

    def open_run(self, run_key: str, run_id: str | None) -> str:
        """Find a run by MLflow's id or by the run's own key, or create it; mark it as running and return its id.

        A run that was deleted is not found, so it is replaced by a new one.
        """
        if self._database is not None:
            _make_database(self._database)  # it may have been removed
        experiment_id = self._experiment_id()
        found = self._find_run(experiment_id, run_key, run_id)
        if found is None:
            return str(
                self._client.create_run(experiment_id, run_name=self._run_name, tags={_KEY_TAG: run_key}).info.run_id
            )
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
            ("the tags", partial(self._write_tags, tags=self._facts.tags)),
            ("the datasets", self._write_datasets),
        ):
            try:
                failed |= write(run_id)
            except Exception as error:  # one part must not keep back the others, or the metrics
                failed[name] = error
        return failed

    def store_artifacts(self, run_id: str) -> dict[str, Exception]:
        """Store the artifacts. Returns those that could not be stored. The artifact store may take minutes to fail."""
        failed: dict[str, Exception] = {}
        for name, text in self._facts.artifacts.items():
            try:
                self._client.log_text(run_id, text, name)
            except Exception as error:
                failed[name] = error
        return failed

    def steps_of(self, run_id: str, key: str, from_step: int) -> set[int]:
        """Steps >= `from_step` for which the run has a point of `key`."""
        history = self._client.get_metric_history(run_id, _allowed_name(key))
        return {point.step for point in history if point.step >= from_step}

    def send(self, run_id: str, entries: list[MetricsEntry]) -> dict[str, Exception]:
        """Store metrics. If the store is a database, sending the same entry twice yields a single point.

        Returns the metrics that MLflow refuses; they are not sent again.
        """
        from mlflow.entities import Metric

        points = [
            (f"metric {key}", Metric(_allowed_name(key), value, round(entry.time * 1000), entry.step))
            for entry in entries
            for key, value in entry.metrics.items()
            if f"metric {key}" not in self._refused_metrics
        ]
        refused = self._deliver(run_id, "metrics", points, _PER_BATCH["metrics"])
        self._refused_metrics |= refused.keys()
        return refused

    def end_run(self, run_id: str, status: str) -> None:
        """Mark the run as ended: FINISHED, FAILED or KILLED."""
        self._client.set_terminated(run_id, status=status)

    def _write_params(self, run_id: str) -> dict[str, Exception]:
        from mlflow.entities import Param

        params = {_allowed_name(key): str(value)[:_PARAM_CHARS] for key, value in self._facts.params.items()}
        known = self._client.get_run(run_id).data.params
        new = [(f"parameter {key}", Param(key, value)) for key, value in params.items() if key not in known]
        changed = {f"changed.{key}": value for key, value in params.items() if known.get(key, value) != value}
        refused = self._deliver(run_id, "params", new, _PER_BATCH["params"])
        return refused | self._write_tags(run_id, changed)

    def _write_tags(self, run_id: str, tags: Mapping[str, str]) -> dict[str, Exception]:
        from mlflow.entities import RunTag

        items = [(f"tag {key}", RunTag(key, value[:_TAG_CHARS])) for key, value in tags.items()]
        return self._deliver(run_id, "tags", items, _PER_BATCH["tags"])

    def _write_datasets(self, run_id: str) -> dict[str, Exception]:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        failed: dict[str, Exception] = {}
        for source, digest in self._facts.datasets.items():
            dataset = Dataset(Path(source).name or source, digest[:_DIGEST_CHARS], "local", source)
            tags = [InputTag("mlflow.data.context", "training")]
            try:
                self._client.log_inputs(run_id, datasets=[DatasetInput(dataset, tags=tags)])
            except Exception as error:
                failed[f"dataset {source}"] = error
        return failed

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
        if found.lifecycle_stage != "active":
            raise ConfigError(
                f"the experiment {self._experiment!r} was deleted on the tracking server, so MLflow accepts no run in "
                f"it. Restore it (mlflow experiments restore --experiment-id {found.experiment_id}, with "
                f"{URI_VARIABLE} set), or set tracking.experiment to another name."
            )
        return str(found.experiment_id)

    def _find_run(self, experiment_id: str, run_key: str, run_id: str | None) -> str | None:
        from mlflow.exceptions import MlflowException

        if run_id is not None:
            try:
                if self._client.get_run(run_id).info.lifecycle_stage == "active":
                    return run_id
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST" and not is_refused(error):  # refused: no id of MLflow
                    raise
        runs = self._client.search_runs([experiment_id], f"tags.`{_KEY_TAG}` = '{run_key}'", max_results=1)
        return str(runs[0].info.run_id) if runs else None


def _make_database(path: Path) -> None:
    """Create MLflow's database file atomically if it does not exist, or if it is empty.

    MLflow needs seconds to create its tables, and it can neither use nor repair a database left by a kill. SQLite
    leaves an empty file if it opens a database that was removed.
    """
    from mlflow import MlflowClient

    if path.exists() and path.stat().st_size > 0:
        with closing(sqlite3.connect(path)) as database:  # MLflow would try for 100 s before it reports a fault
            database.execute("SELECT 1 FROM sqlite_master LIMIT 1")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        made = Path(folder) / path.name
        MlflowClient(tracking_uri=for_mlflow(sqlite_uri(made))).search_experiments(max_results=1)
        if path.exists() and path.stat().st_size == 0:
            path.unlink()
        with suppress(FileExistsError):  # another run created it in the meantime
            os.link(made, path)


def set_environment() -> None:
    """Set MLflow's variables that the user has not set. Call it before MLflow is imported."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def for_mlflow(uri: str) -> str:
    """The URI of a sqlite database with its driver. Without it, MLflow creates a folder of the still quoted path."""
    return uri.replace("sqlite:", "sqlite+pysqlite:", 1) if "%" in uri else uri


@contextmanager
def home() -> Iterator[None]:
    """A HOME while MLflow is imported: it asks for the home folder, which a user without a passwd entry lacks.

    DeepSpeed tries the same import earlier. If that failed, its remains in `sys.modules` would make ours fail too.
    """
    if "mlflow" in sys.modules or os.path.expanduser("~") != "~":
        yield
        return
    for name in [name for name in sys.modules if name.startswith("mlflow.")]:
        del sys.modules[name]
    os.environ["HOME"] = tempfile.gettempdir()
    try:
        yield
    finally:
        del os.environ["HOME"]


def _allowed_name(name: str) -> str:
    """A name with the characters that MLflow allows in names of metrics and parameters."""
    return _FORBIDDEN.sub("_", name)

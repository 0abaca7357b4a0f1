"""Register an export in the MLflow run that trained it, as a model that compresses texts."""

from __future__ import annotations

import json
import os
import warnings
from importlib.metadata import version
from pathlib import Path

from arc_ds.errors import ConfigError
from arc_ds.system.packages import require
from arc_ds.tracking.database import for_mlflow, open_client
from arc_ds.tracking.faults import explained, words_of
from arc_ds.tracking.tracking_state import STATE_NAME, TrackingState
from arc_ds.tracking.uris import resolve_uri, sqlite_database, without_secret
from arc_ds.version import __version__

_MODEL = Path(__file__).parents[1] / "inference" / "mlflow_model.py"


def register_export(export: Path, name: str, *, run: Path, configured: str | None, step: int) -> int:
    """Log an export as a model of its MLflow run and register it. Returns the version in the registry.

    The status and the end of the run stay as they are.

    name: of the registered model.
    run: the run's folder.
    configured: `tracking.uri` of the run's config.
    step: of the export.

    Raises ConfigError if the run is not in MLflow, its server cannot be reached, or MLflow refuses the name.
    """
    require("mlflow")
    uri, run_id = find_mlflow_run(run, configured)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with explained(uri, f"{export} is whole, but cannot be registered as {name!r} in the MLflow run {run_id}"):
        experiment_id = open_client(uri).get_run(run_id).info.experiment_id
        return _log_and_register(for_mlflow(uri), experiment_id, run_id, export, name, step)


def find_mlflow_run(run: Path, configured: str | None) -> tuple[str, str]:
    """Tracking URI and id of a run's MLflow run, as its folder records them.

    A database in a run's folder is found there, even if the folder was moved. Passwords come from the config or from
    MLFLOW_TRACKING_URI.

    Raises ConfigError if the folder records no MLflow run, or if its database no longer exists.
    """
    try:
        state = TrackingState(**json.loads((run / STATE_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{run} records no MLflow run ({STATE_NAME}: {words_of(error)}), so nothing can be registered there. Train "
            "with tracking.mlflow=true."
        ) from error
    if state.run_id is None:
        raise ConfigError(
            f"the MLflow server {state.uri} has never answered the run in {run}. Start the run again with its command: "
            "it sends what the server missed."
        )
    here, found = resolve_uri(run, configured), state.uri
    candidates = [here] if without_secret(here) == found else [found, resolve_uri(run, None)]
    for uri in candidates:
        database = sqlite_database(uri)
        if database is None or database.is_file():
            return uri, state.run_id
    raise ConfigError(
        f"{sqlite_database(found)}, the MLflow database of the run in {run}, does not exist. Restore it, or start the "
        "run again with its command: it fills a new one from metrics.jsonl."
    )


def _log_and_register(uri: str, experiment_id: str, run_id: str, export: Path, name: str, step: int) -> int:
    """Log and register without `start_run`: a kill would leave the run with the status RUNNING."""
    import mlflow
    from mlflow.models import Model
    from mlflow.models.signature import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    signature = ModelSignature(
        inputs=Schema([ColSpec("string")]),
        outputs=Schema([ColSpec("string", "vectors"), ColSpec("long", "rows"), ColSpec("long", "width")]),
        params=ParamSchema([ParamSpec("decoder", "long", 0), ParamSpec("marker", "string", "auto")]),
    )
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        mlflow.set_experiment(experiment_id=experiment_id)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about examples and annotations, which the signature replaces
            logged = Model.log(
                artifact_path=None,
                flavor=mlflow.pyfunc,
                run_id=run_id,
                name="compressor",
                python_model=str(_MODEL),
                artifacts={"export": str(export)},
                signature=signature,
                pip_requirements=[
                    f"arc-ds[inference]=={__version__}",
                    *(f"{package}=={version(package).partition('+')[0]}" for package in ("torch", "mlflow")),
                ],
                registered_model_name=name,
                step=step,
            )
    finally:
        mlflow.set_tracking_uri(before)
    return int(logged.registered_model_version)

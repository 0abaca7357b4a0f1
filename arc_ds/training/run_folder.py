"""The run's folder: what is written there, what a run resumes from, and what it refuses to overwrite.

RUN/config.yaml         the resolved config of the last start
RUN/checkpoints/        see `checkpoint.py`
RUN/metrics.jsonl       every metric of every step
RUN/mlflow.db           MLflow's tracking store, where the config names no other
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arc_ds import dist
from arc_ds.config.deepspeed import resolve_deepspeed
from arc_ds.config.load import config_hash, differences, dump_yaml, flatten, load_config, numerics
from arc_ds.config.schema import RunConfig
from arc_ds.device import describe_device
from arc_ds.errors import CheckpointError, ConfigError, DataError
from arc_ds.export.consolidate import TrainedFor
from arc_ds.training.build_model import encoder_tokenizer_path
from arc_ds.training.checkpoint import (
    TrainerState,
    check_checkpoint,
    find_resumable,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from arc_ds.training.mlflow_server import DatasetFacts, RunFacts, environment_tags, package_versions, start_tracker
from arc_ds.training.run import Run
from arc_ds.training.tracking import Tracker

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.yaml"
CHECKPOINTS = "checkpoints"


def check_run_folder(config: RunConfig) -> None:
    """ConfigError where the folder holds a run of another config, or a run that must not be resumed.

    Looks at files only, so it can be asked before anything is built.
    """
    folder = Path(config.run_dir)
    if (folder / CONFIG_NAME).is_file():
        former = load_config(folder / CONFIG_NAME)
        changed = differences(numerics(former), numerics(config))
        if changed and list_checkpoints(folder / CHECKPOINTS):
            raise ConfigError(
                f"{folder} holds a run of another config; different are: {'; '.join(changed[:8])}. Give this one a "
                "run_dir of its own, or the old values to go on with the old run."
            )
    if config.checkpoint.resume == "never" and list_checkpoints(folder / CHECKPOINTS):
        raise ConfigError(
            f"{folder} already holds checkpoints, and checkpoint.resume is never: nothing saved is overwritten. Choose "
            "another run_dir, or resume=auto."
        )


def resume(run: Run) -> TrainerState | None:
    """Loads what the config asks to resume from, if there is anything; a collective. Sets `run.step`.

    CheckpointError where a named checkpoint is not whole, ConfigError or DataError where it is of another config or of
    other data.
    """
    wanted = run.config.checkpoint.resume
    if wanted == "never":
        return None
    path = find_resumable(run.folder / CHECKPOINTS) if wanted == "auto" else _named(Path(wanted))
    if path is None:
        return None
    state = load_checkpoint(run.engine, path)
    if state.config_hash != config_hash(run.config):
        raise ConfigError(
            f"{path} was written by a run of another config (compare {CONFIG_NAME} in its run's folder). To start from "
            "its weights, export it and set encoder.init_from."
        )
    if state.data_fingerprint != run.data.order.fingerprint:
        raise DataError(
            f"the data are not those that {path} was trained on: shards, weights or their order have changed. Restore "
            "them, or start a new run from its weights (export it and set encoder.init_from)."
        )
    run.step = state.step
    logger.info("resumed from %s at step %d", path, state.step)
    return state


class RunFolder:
    """Writes a run's folder: metrics, checkpoints, and on rank 0 the tracker's feed."""

    def __init__(self, run: Run, tracker: Tracker | None) -> None:
        self._run = run
        self._tracker = tracker

    @staticmethod
    def open(run: Run) -> RunFolder:
        """Resumes where there is something to resume from and opens the tracker; a collective."""
        state = resume(run)
        tracker = None
        if dist.is_main():
            run.folder.mkdir(parents=True, exist_ok=True)
            (run.folder / CONFIG_NAME).write_text(dump_yaml(run.config), encoding="utf-8")
            tracker = open_tracker(run, None if state is None else state.mlflow_run_id)
        dist.barrier()
        return RunFolder(run, tracker)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of a step, on rank 0 (elsewhere nothing happens)."""
        if self._tracker is not None:
            self._tracker.log(step, metrics)

    def save(self, run: Run) -> None:
        """A checkpoint of the run as it is; a collective."""
        settings = run.config.checkpoint
        path = save_checkpoint(
            run.engine,
            run.folder / CHECKPOINTS,
            run.step,
            trainer_state(run, None if self._tracker is None else self._tracker.run_id),
            keep_last=settings.keep_last,
            keep_every=settings.keep_every or 0,
        )
        logger.info("saved %s", path)

    def close(self, status: str) -> None:
        """Sends what is left to the tracker. status: FINISHED, FAILED or KILLED (stopped, to be resumed)."""
        if self._tracker is not None:
            self._tracker.close(status)


def trainer_state(run: Run, mlflow_run_id: str | None) -> TrainerState:
    """What goes into a checkpoint beside weights and optimizer; `export` reads `extra`."""
    decoders = [TrainedFor(name=d.name, rope_scaling=d.rope_scaling) for d in run.config.decoders]
    return TrainerState(
        step=run.step,
        data_position=run.step * run.config.data.batch_size,
        data_fingerprint=run.data.order.fingerprint,
        config_hash=config_hash(run.config),
        mlflow_run_id=mlflow_run_id,
        versions=package_versions(),
        extra={
            "compressor": run.spec.to_json(),
            "encoder_tokenizer": str(encoder_tokenizer_path(run.config).resolve()),
            "decoders": [asdict(decoder) for decoder in decoders],
        },
    )


def open_tracker(run: Run, mlflow_run_id: str | None) -> Tracker:
    """The tracker of the run, with MLflow where the config wants it. For rank 0."""
    settings = run.config.tracking
    if not settings.mlflow:
        return Tracker(run.folder, uri=None, make_server=None, resumed_step=run.step)
    world_size = dist.world_size()
    ds_config = resolve_deepspeed(run.config.deepspeed, run.config, world_size, dist.local_world_size())
    facts = RunFacts(
        params=flatten(run.config),
        artifacts={CONFIG_NAME: dump_yaml(run.config), "deepspeed.json": json.dumps(ds_config, indent=2)},
        tags=environment_tags(device=describe_device(run.device), world_size=world_size),
        datasets=[
            DatasetFacts(name=Path(source.folder).name, digest=source.fingerprint, source=str(source.folder))
            for source in run.data.sources
        ],
    )
    return start_tracker(
        run.folder,
        uri=settings.uri,
        experiment=settings.experiment,
        run_name=settings.run_name,
        facts=facts,
        resumed_step=run.step,
        run_id=mlflow_run_id,
    )


def _named(path: Path) -> Path:
    faults: Any = check_checkpoint(path) if path.is_dir() else [f"there is no folder {path}"]
    if faults:
        raise CheckpointError(f"checkpoint.resume={path}: {'; '.join(faults)}. Name a whole step_NNNNNN, or auto.")
    return path

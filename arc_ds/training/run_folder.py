"""The run's folder: its contents, the checkpoint to resume from, and checks against overwriting saved work.

RUN/config.yaml         the resolved config of the last start
RUN/checkpoints/        see `checkpoint.py`
RUN/metrics.jsonl       every metric of every step
RUN/mlflow.db           MLflow's tracking store, unless the config names another one
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from arc_ds.checkpoints.checkpoint import (
    TrainerState,
    check_checkpoint,
    find_resumable,
    list_checkpoints,
    load_checkpoint,
    read_trainer_state,
    save_checkpoint,
    step_of,
)
from arc_ds.checkpoints.manifest import read_manifest
from arc_ds.checkpoints.trained_for import TrainedFor
from arc_ds.config.load import config_hash, differences, dump_yaml, flatten, load_config, numerics
from arc_ds.config.schema import RunConfig, SourceConfig
from arc_ds.errors import CheckpointError, ConfigError, DataError, TokenizerError, WeightsError
from arc_ds.planning.sizes import longest_context
from arc_ds.system import dist
from arc_ds.system.device import describe_device
from arc_ds.system.files import write_whole
from arc_ds.system.urls import shown_url
from arc_ds.tracking.metrics_log import METRICS_NAME, read_metrics
from arc_ds.tracking.mlflow_server import DatasetFacts, RunFacts, environment_tags, package_versions, start_tracker
from arc_ds.tracking.tracking import Tracker
from arc_ds.training.build_model import encoder_tokenizer_path
from arc_ds.training.run import Run

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.yaml"
CHECKPOINTS = "checkpoints"


def check_run_folder(config: RunConfig) -> None:
    """Raise ConfigError if this start would overwrite saved work or continue a run that it must not continue.

    It must not continue a run with a different config, or any run if `checkpoint.resume` is "never". The check reads
    files only, so it can run before anything is built.
    """
    folder = Path(config.run_dir)
    if not _is_used(folder):
        _check_foreign_config(folder, config)
        return
    if (folder / CONFIG_NAME).is_file():
        changed = differences(numerics(load_config(folder / CONFIG_NAME)), numerics(config))
        if changed:
            raise ConfigError(
                f"{folder} holds a run with another config. Different values: {'; '.join(changed[:8])}. Choose another "
                "run_dir, or restore the old values to continue the old run."
            )
    if config.checkpoint.resume == "never":
        raise ConfigError(
            f"{folder} already holds a run, and checkpoint.resume is never; saved work is not overwritten. Choose "
            "another run_dir, or set checkpoint.resume=auto."
        )
    if config.checkpoint.resume != "auto":
        _check_nothing_lies_beyond(folder, Path(config.checkpoint.resume))


def find_start(
    config: RunConfig, data_fingerprint: str, tokenizers: Mapping[str, str], backbones: Mapping[str, str]
) -> Path | None:
    """Find the checkpoint to resume from; None if the run starts from step 0. Collective.

    The returned checkpoint is complete and matches the config and the given fingerprints. Raises CheckpointError if
    the named checkpoint is incomplete, or if the folder has checkpoints but no complete one (the run never silently
    restarts from its first step). Raises ConfigError, DataError, TokenizerError or WeightsError if the checkpoint has
    a different config, data, tokenizer or backbone.
    """
    wanted = config.checkpoint.resume
    if wanted == "never":
        return None
    folder = Path(config.run_dir) / CHECKPOINTS
    path = find_resumable(folder) if wanted == "auto" else _named(Path(wanted))
    with dist.fail_together():
        if path is None and list_checkpoints(folder):
            raise CheckpointError(
                f"none of the checkpoints in {folder} is complete; see the warnings above. Restore one of them, or "
                "start a new run in another run_dir."
            )
        if path is not None:
            _check_is_of(path, config, data_fingerprint, tokenizers, backbones)
    return path


def resume(run: Run) -> TrainerState | None:
    """Load the checkpoint from `find_start` and restore the run's counters. Collective. None without a checkpoint."""
    path = find_start(run.config, run.data.order.fingerprint, run.tokenizers, run.backbones)
    if path is None:
        return None
    state = load_checkpoint(run.engine, path)
    run.step = state.step
    run.skipped_steps = int(state.extra.get("skipped_steps", 0))
    run.skipped_in_row = int(state.extra.get("skipped_in_row", 0))
    run.data_counts.update(state.extra.get("data_counts", {}))
    logger.info("resumed from %s at step %d", path, state.step)
    if path.parent.resolve() != (run.folder / CHECKPOINTS).resolve():
        return replace(state, mlflow_run_id=None)  # a branch of another run gets its own MLflow run
    return state


class RunFolder:
    """Writes metrics and checkpoints to a run's folder; rank 0 also feeds the tracker."""

    def __init__(self, run: Run, tracker: Tracker | None) -> None:
        self._run = run
        self._tracker = tracker

    @staticmethod
    def open(run: Run) -> RunFolder:
        """Resume the run if there is a checkpoint, and open the tracker. Collective."""
        state = resume(run)
        tracker = None
        if dist.is_main():
            run.folder.mkdir(parents=True, exist_ok=True)
            write_whole(run.folder / CONFIG_NAME, dump_yaml(run.config))
            tracker = open_tracker(run, None if state is None else state.mlflow_run_id)
        dist.barrier()
        return RunFolder(run, tracker)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of a step on rank 0; does nothing on other ranks."""
        if self._tracker is not None:
            self._tracker.log(step, metrics)

    def last_logged(self, key: str) -> int | None:
        """The last step with `key` in `metrics.jsonl`; None if there is none. Collective."""
        entries = read_metrics(self._run.folder / METRICS_NAME) if dist.is_main() else ()
        return dist.broadcast_object(max((entry.step for entry in entries if key in entry.metrics), default=None))

    def save(self, run: Run) -> None:
        """Save a checkpoint of the run. Collective."""
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
        """Send the remaining metrics to the tracker. status: FINISHED, FAILED or KILLED (stopped, can be resumed)."""
        if self._tracker is not None:
            self._tracker.close(status)


def trainer_state(run: Run, mlflow_run_id: str | None) -> TrainerState:
    """The state that a checkpoint stores in addition to weights and optimizer; `export` reads `extra`."""
    bos = run.config.data.decoder_bos
    decoders = [TrainedFor(name=d.name, rope_scaling=d.rope_scaling, bos=bos) for d in run.config.decoders]
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
            "max_context_tokens": longest_context(run.config),
            "tokenizers": dict(run.tokenizers),
            "backbones": dict(run.backbones),
            "skipped_steps": run.skipped_steps,
            "skipped_in_row": run.skipped_in_row,
            "data_counts": dict(run.data_counts),
        },
    )


def without_secrets(config: RunConfig) -> RunConfig:
    """The config with passwords and signatures removed from shard URLs."""

    def shown(source: SourceConfig) -> SourceConfig:
        return replace(source, path=shown_url(source.path))

    data = config.data
    held_out = data.validation
    if isinstance(held_out, str):
        held_out = shown_url(held_out)
    elif held_out is not None:
        held_out = tuple(map(shown, held_out))
    return replace(config, data=replace(data, sources=tuple(map(shown, data.sources)), validation=held_out))


def open_tracker(run: Run, mlflow_run_id: str | None) -> Tracker:
    """The tracker of the run, with MLflow if the config enables it. For rank 0."""
    settings = run.config.tracking
    if not settings.mlflow:
        return Tracker(run.folder, uri=None, make_server=None, resumed_step=run.step)
    config = without_secrets(run.config)
    facts = RunFacts(
        params=flatten(config),
        artifacts={CONFIG_NAME: dump_yaml(config), "deepspeed.json": json.dumps(run.ds_config, indent=2)},
        tags=environment_tags(device=describe_device(run.device), world_size=dist.world_size()),
        datasets=[
            DatasetFacts(name=Path(shards.name).name, digest=shards.fingerprint, source=shards.name)
            for shards in (source.shards for source in run.data.sources)
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


def _is_used(folder: Path) -> bool:
    """Whether the folder contains steps of a run."""
    metrics = folder / METRICS_NAME
    return bool(list_checkpoints(folder / CHECKPOINTS)) or (metrics.is_file() and metrics.stat().st_size > 0)


def _check_foreign_config(folder: Path, config: RunConfig) -> None:
    """Raise ConfigError if the resolved config would overwrite a config file that a user keeps in the folder."""
    path = folder / CONFIG_NAME
    if path.is_file() and path.read_text(encoding="utf-8", errors="replace") != dump_yaml(config):
        raise ConfigError(
            f"run_dir={folder} holds no run but contains a {CONFIG_NAME} that this run would overwrite. Choose another "
            "run_dir, or rename that file."
        )


def _check_nothing_lies_beyond(folder: Path, start: Path) -> None:
    later = [path for path in list_checkpoints(folder / CHECKPOINTS) if step_of(path) > step_of(start)]
    if later:
        raise ConfigError(
            f"checkpoint.resume={start}: {folder} holds later checkpoints ({', '.join(path.name for path in later)}); "
            "saved work is not overwritten. Choose another run_dir, or move the later checkpoints elsewhere."
        )


def _named(path: Path) -> Path:
    faults = check_checkpoint(path) if path.is_dir() else [f"folder {path} does not exist"]
    if faults:
        raise CheckpointError(f"checkpoint.resume={path}: {'; '.join(faults)}. Name a complete step_NNNNNN, or auto.")
    return path


def _check_is_of(
    path: Path,
    config: RunConfig,
    data_fingerprint: str,
    tokenizers: Mapping[str, str],
    backbones: Mapping[str, str],
) -> None:
    state = read_trainer_state(path)
    if state.config_hash != config_hash(config):
        raise ConfigError(
            f"{path} was written by a run with another config (compare {CONFIG_NAME} in that run's folder). To start "
            "from its weights, export it and set encoder.init_from."
        )
    _check_ranks(path, config)
    if state.data_fingerprint != data_fingerprint:
        raise DataError(
            f"the data differ from the data that {path} was trained on: shards, source weights or their order have "
            "changed. Restore them, or start a new run from its weights (export it and set encoder.init_from)."
        )
    changed = _changed(state.extra.get("tokenizers", {}), tokenizers)
    if changed:
        raise TokenizerError(
            f"the tokenizer of {changed} differs from the one that {path} was trained with: its files have changed, so "
            "token ids or chat turns have another meaning. Restore the files (key `tokenizer`)."
        )
    changed = _changed(state.extra.get("backbones", {}), backbones)
    if changed:
        raise WeightsError(
            f"the weights at {changed} differ from those that {path} was trained with: the path leads to another "
            "model, or to the same model in another format or split. Name the files that the run was started with."
        )


def _check_ranks(path: Path, config: RunConfig) -> None:
    """Raise ConfigError if the loss is a mean over ranks and the number of ranks has changed."""
    before, now = read_manifest(path).world_size, dist.world_size()
    if config.loss.normalize == "rank_mean" and before != now:
        raise ConfigError(
            f"{path} was written by {before} ranks, but this run has {now}: with loss.normalize=rank_mean every rank "
            f"has the same weight, so the loss would change. Resume with {before} ranks, or start a new run from "
            "its weights (export it and set encoder.init_from)."
        )


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Comma-separated keys whose values differ or exist on one side only."""
    return ", ".join(key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key))

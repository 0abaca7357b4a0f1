"""The run's folder: its contents, the checkpoint to resume from, and checks against overwriting saved work.

RUN/config.yaml         the resolved config of the last start
RUN/facts.json          host, device, versions, data digests and DeepSpeed's JSON of the last start
RUN/checkpoints/        see `checkpoint.py`
RUN/metrics.jsonl       every metric of every step
RUN/system_metrics/     load of each host
RUN/../mlflow.db        MLflow's tracking store of all runs beside it, unless the config names another one
RUN/lock                held by the run that writes here
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from arc_ds.checkpoints.checkpoint import (
    TrainerState,
    check_checkpoint,
    find_resumable,
    list_checkpoints,
    load_checkpoint,
    read_trainer_state,
    reading,
    step_of,
)
from arc_ds.checkpoints.frozen_source import FrozenSource
from arc_ds.checkpoints.manifest import read_manifest
from arc_ds.checkpoints.writer import CheckpointWriter
from arc_ds.config.load import config_hash, differences, dump_yaml, flatten, load_config, numerics
from arc_ds.config.schema import RunConfig, SourceConfig
from arc_ds.errors import CheckpointError, ConfigError, DataError, StorageError, TokenizerError, WeightsError
from arc_ds.inference.load import source_checkpoint
from arc_ds.planning.sizes import longest_context
from arc_ds.system import dist
from arc_ds.system.device import describe_device
from arc_ds.system.files import file_size, output, write_whole
from arc_ds.system.locks import LOCK_FILE, writing
from arc_ds.system.urls import shown_url
from arc_ds.tracking.liveness import FACTS_NAME
from arc_ds.tracking.metrics_log import METRICS_NAME, read_metrics
from arc_ds.tracking.mlflow_server import (
    DIGEST_CHARS,
    RunFacts,
    environment_tags,
    package_versions,
    start_tracker,
)
from arc_ds.tracking.system_metrics import SystemMetrics
from arc_ds.tracking.tracking import Tracker
from arc_ds.tracking.uris import without_secret
from arc_ds.training.build_model import lora_spec
from arc_ds.training.run import InputDigests, Run

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.yaml"
CHECKPOINTS = "checkpoints"
_ANOTHER = "Use another checkpoint of the run."
_SHARED_WITHIN_S = 90.0  # NFS shows new files after up to a minute


@contextmanager
def lock_run_folder(config: RunConfig) -> Iterator[None]:
    """Keep other runs out of the run's folder. For rank 0. Raises ConfigError if one is going on there."""
    folder = Path(config.run_dir)
    cure = (
        "Wait until it has ended, stop it, or choose another run_dir. Some network file systems keep the lock of a "
        f"host that is down: if that host is, delete {folder / LOCK_FILE}."
    )
    with ExitStack() as lock:
        with output(folder):
            lock.enter_context(writing(folder, "run", ConfigError, cure))
        yield


def check_run_folder(config: RunConfig) -> None:
    """Raise ConfigError if this start would overwrite saved work or continue a run that it must not continue.

    It must not continue a run with a different config, or any run if `checkpoint.resume` is "never". The check reads
    files only, so it can run before anything is built.
    """
    folder = Path(config.run_dir)
    path, metrics, resume = folder / CONFIG_NAME, folder / METRICS_NAME, config.checkpoint.resume
    checkpoints = list_checkpoints(folder / CHECKPOINTS)
    if not checkpoints and not file_size(metrics):
        if path.is_file() and path.read_text(encoding="utf-8", errors="replace") != dump_yaml(config):
            raise ConfigError(
                f"run_dir={folder} holds no run but contains a {CONFIG_NAME} that this run would overwrite. Choose "
                "another run_dir, or rename that file."
            )
        return
    changed = differences(numerics(load_config(path)), numerics(config)) if path.is_file() else ()
    if changed:
        raise ConfigError(
            f"{folder} holds a run with another config. Different values: {'; '.join(changed[:8])}. Choose another "
            "run_dir, or restore the old values to continue the old run."
        )
    if resume == "never":
        raise ConfigError(
            f"{folder} already holds a run, and checkpoint.resume is never; saved work is not overwritten. Choose "
            "another run_dir, or set checkpoint.resume=auto."
        )
    later = [] if resume == "auto" else [each.name for each in checkpoints if step_of(each) > step_of(Path(resume))]
    if later:
        raise ConfigError(
            f"checkpoint.resume={resume}: {folder} holds later checkpoints ({', '.join(later)}); saved work is not "
            "overwritten. Choose another run_dir, or move the later checkpoints elsewhere."
        )


def find_start(config: RunConfig, inputs: InputDigests) -> Path | None:
    """Find the checkpoint to resume from; None if the run starts from step 0. Collective.

    The returned checkpoint is whole and matches the config and the given digests. Raises CheckpointError if the named
    checkpoint is not whole, or if the folder has checkpoints but no whole one (the run never silently restarts from its
    first step). Raises ConfigError, DataError, TokenizerError or WeightsError if the checkpoint has a different config,
    data, tokenizer or backbone.
    """
    wanted = config.checkpoint.resume
    if wanted == "never":
        return None
    folder = Path(config.run_dir) / CHECKPOINTS
    path = find_resumable(folder) if wanted == "auto" else _named(Path(wanted))
    with dist.fail_together():
        if path is None and list_checkpoints(folder):
            raise CheckpointError(
                f"none of the checkpoints in {folder} is whole; see the warnings above. Restore one of them, or "
                "start a new run in another run_dir."
            )
        if path is not None:
            with reading(path):
                _check_is_of(path, config, inputs)
    return path


def check_shared(folder: Path) -> None:
    """Raise StorageError if a rank does not see the config that rank 0 has just written. Collective.

    Otherwise the first checkpoint would fail, after hours. A shared file system may show the file late.
    """
    path, deadline = folder / CONFIG_NAME, time.monotonic() + _SHARED_WITHIN_S
    written = dist.broadcast_object(path.stat().st_mtime_ns if dist.is_main() else None)
    with dist.fail_together():
        while _time_of(path) != written:
            if time.monotonic() > deadline:
                raise StorageError(
                    f"{socket.gethostname()} does not see the {path} that rank 0 has written. All hosts must see the "
                    "same files there. Give a run_dir on a file system that they share."
                )
            time.sleep(0.1)


def _time_of(path: Path) -> int | None:
    """Time of a file's last change. The listing and the opening make NFS ask its server."""
    with suppress(OSError):
        os.listdir(path.parent)
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    return None


class RunFolder:
    """The folder of a run. Resumes the run from it, and writes its metrics and checkpoints to it."""

    def __init__(self, config: RunConfig, run: Run) -> None:
        """Resume the run if there is a checkpoint, and open the tracker on rank 0. Collective."""
        self._config = config
        self._run = run
        settings = config.checkpoint
        self._writer = CheckpointWriter(
            run.folder / CHECKPOINTS,
            keep_last=settings.keep_last,
            keep_every=settings.keep_every or 0,
            asynchronous=settings.asynchronous,
        )
        self._failed_saves = 0
        self._error: StorageError | None = None  # of the newest save
        mlflow_run_id = self._resume()
        self._tracker: Tracker | None = None
        self._system: SystemMetrics | None = None
        host = socket.gethostname()
        hosts = dist.gather_objects(host)
        with dist.fail_together(), output(run.folder):
            if dist.is_main():
                run.folder.mkdir(parents=True, exist_ok=True)
                write_whole(run.folder / CONFIG_NAME, dump_yaml(config))
                write_whole(run.folder / FACTS_NAME, _facts_of_start(run, hosts))
                self._tracker = _open_tracker(config, run, mlflow_run_id, hosts)
            every_s = config.tracking.system_metrics_every_s if config.tracking.mlflow else 0
            if every_s and hosts.index(host) == dist.rank():
                self._system = SystemMetrics(run.folder, host, every_s=every_s)
        check_shared(run.folder)

    def _resume(self) -> str | None:
        """Load the checkpoint from `find_start`. Collective. Returns the MLflow run to continue."""
        run = self._run
        path = find_start(self._config, run.inputs)
        if path is None:
            return None
        state = load_checkpoint(run.engine, path)
        run.step = state.step
        try:
            run.skipped_steps = int(state.extra.get("skipped_steps", 0))
            run.skipped_in_row = int(state.extra.get("skipped_in_row", 0))
            if run.spikes is not None:
                run.spikes.load_json(state.extra.get("spikes") or {})
            run.data_counts.update({name: int(num) for name, num in state.extra.get("data_counts", {}).items()})
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: `extra` of the trainer's state has no counts: {error}. {_ANOTHER}"
            ) from error
        logger.info("resumed from %s at step %d", path, state.step)
        is_own = path.parent.resolve() == (run.folder / CHECKPOINTS).resolve()
        return state.mlflow_run_id if is_own else None  # a branch of another run gets its own MLflow run

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of a step on rank 0; does nothing on other ranks."""
        if self._tracker is not None:
            self._tracker.log(step, metrics)

    def last_logged(self, key: str) -> int | None:
        """The last step with `key` in `metrics.jsonl`; None if there is none. Collective."""
        entries = read_metrics(self._run.folder / METRICS_NAME) if dist.is_main() else ()
        return dist.broadcast_object(max((entry.step for entry in entries if key in entry.metrics), default=None))

    @property
    def has_failed_save(self) -> bool:
        """Whether a save has failed on this rank for which the run must end (`checkpoint.on_error`)."""
        return self._config.checkpoint.on_error == "stop" and self._writer.has_failed

    def save(self, run: Run) -> None:
        """Start to save a checkpoint of the run, after the one in flight is whole. Collective.

        Raises StorageError if one of them cannot be written, unless `checkpoint.on_error` is "continue".
        """
        state = _trainer_state(self._config, run, None if self._tracker is None else self._tracker.run_id)
        with self._counted():
            self._writer.finish()
        with self._counted():
            self._writer.save(run.engine, state, run.ports.kept)
        self.log(run.step, {"checkpoint/failed_saves": float(self._failed_saves)})

    def finish(self) -> None:
        """Wait until the last checkpoint is whole. If it failed, raise its StorageError in any case. Collective."""
        self._writer.finish()
        if self._error is not None:
            raise self._error

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """A block that writes a checkpoint. If that fails, it is counted, and the run goes on if the config says so."""
        self._error = None
        try:
            yield
        except StorageError as error:
            self._failed_saves, self._error = self._failed_saves + 1, error
            if self._config.checkpoint.on_error == "stop":
                raise
            if dist.is_main():
                logger.warning(
                    "%s The run goes on (checkpoint.on_error: continue). The next save succeeds if the cause is gone.",
                    error,
                )

    def close(self, status: str) -> None:
        """Wait for the save in flight, and send the remaining metrics to the tracker.

        status: FINISHED, FAILED or KILLED (stopped, can be resumed).
        """
        self._writer.close()
        if self._system is not None:
            self._system.close()
        if self._tracker is not None:
            self._tracker.close(status)


def _trainer_state(config: RunConfig, run: Run, mlflow_run_id: str | None) -> TrainerState:
    """The state that a checkpoint stores in addition to weights and optimizer; `export` reads `extra`."""
    return TrainerState(
        step=run.step,
        data_position=run.step * config.data.batch_size,
        data_fingerprint=run.inputs.data,
        config_hash=config_hash(config),
        mlflow_run_id=mlflow_run_id,
        versions=package_versions(),
        extra={
            "compressor": run.ports.spec.to_json(),
            "encoder_tokenizer": str(Path(config.encoder.tokenizer or config.encoder.backbone).resolve()),
            "decoders": [asdict(record.decoder) for record in run.ports.records],
            "max_context_tokens": longest_context(config),
            "tokenizers": run.inputs.tokenizers,
            "decoder_ids": [record.ids_digest for record in run.ports.records],
            "decoder_weights": {r.decoder.name: r.weights for r in run.ports.records if r.weights is not None},
            "port_places": list(run.ports.places),
            "lora_scale": None if (lora := lora_spec(config.encoder.lora)) is None else lora.scale,
            "backbones": run.inputs.backbones,
            "frozen": _frozen_source(config, run),
            "skipped_steps": run.skipped_steps,
            "skipped_in_row": run.skipped_in_row,
            "spikes": None if run.spikes is None else run.spikes.to_json(),
            "data_counts": dict(run.data_counts),
        },
    )


def _frozen_source(config: RunConfig, run: Run) -> dict[str, str] | None:
    """The record of the files that hold the run's frozen weights; None if it trains all weights of its compressor."""
    if all(param.requires_grad for param in run.engine.module.parameters()):
        return None
    encoder = config.encoder
    key: Literal["encoder.backbone", "encoder.init_from"]
    key = "encoder.backbone" if encoder.init_from is None else "encoder.init_from"
    source = FrozenSource(
        key=key,
        path=str(Path(encoder.init_from or encoder.backbone).resolve()),
        digest=run.inputs.backbones[key],
        backbone=str(Path(encoder.backbone).resolve()),
        rope_scaling=encoder.rope_scaling,
        dtype="bfloat16" if config.precision == "bf16" else "float32",
    )
    return asdict(source)


def without_secrets(config: RunConfig) -> RunConfig:
    """The config with passwords and signatures removed from shard URLs and the tracking URI."""

    def shown(sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        return tuple(replace(source, path=shown_url(source.path)) for source in sources)

    data, held_out = config.data, config.data.validation
    held_out = shown_url(held_out) if isinstance(held_out, str) else held_out and shown(held_out)
    tracking = replace(config.tracking, uri=config.tracking.uri and without_secret(config.tracking.uri))
    return replace(config, data=replace(data, sources=shown(data.sources), validation=held_out), tracking=tracking)


def _facts_of_start(run: Run, hosts: Sequence[str]) -> str:
    """Content of `facts.json`: tags, data digests and DeepSpeed's JSON, as MLflow gets them. hosts: of each rank."""
    facts = {
        "tags": _tags(run, hosts),
        "datasets": {source.shards.name: source.shards.fingerprint for source in run.data.sources},
        "held_out": None if run.validator is None else run.validator.fingerprint,
        "deepspeed": run.ds_config,
    }
    return json.dumps(facts, indent=1) + "\n"


def _tags(run: Run, hosts: Sequence[str]) -> dict[str, str]:
    placements = {name: placed.placement for name, placed in zip(run.decoder_names, run.decoders, strict=True)}
    tags = environment_tags(device=describe_device(run.device), hosts=hosts, placements=placements)
    return tags | {f"digest.{key}": digest[:DIGEST_CHARS] for key, digest in run.inputs.backbones.items()}


def _open_tracker(config: RunConfig, run: Run, mlflow_run_id: str | None, hosts: Sequence[str]) -> Tracker:
    """The tracker of the run, with MLflow if the config enables it. For rank 0. hosts: host of each rank."""
    if not config.tracking.mlflow:
        return Tracker(run.folder, resumed_step=run.step)
    shown = without_secrets(config)
    facts = RunFacts(
        params=flatten(shown),
        artifacts={CONFIG_NAME: dump_yaml(shown), "deepspeed.json": json.dumps(run.ds_config, indent=2)},
        tags=_tags(run, hosts),
        datasets={source.shards.name: source.shards.fingerprint for source in run.data.sources},
        held_out=None if run.validator is None else run.validator.fingerprint,
        source_checkpoint=None
        if config.encoder.init_from is None
        else source_checkpoint(Path(config.encoder.init_from)),
    )
    return start_tracker(run.folder, config.tracking, facts, resumed_step=run.step, run_id=mlflow_run_id)


def _named(path: Path) -> Path:
    faults = check_checkpoint(path) if path.is_dir() else [f"{path} is not a folder"]
    if faults:
        raise CheckpointError(f"checkpoint.resume={path}: {'; '.join(faults)}. Name a whole step_NNNNNN, or auto.")
    return path


def _check_is_of(path: Path, config: RunConfig, inputs: InputDigests) -> None:
    state = read_trainer_state(path)
    if state.config_hash != config_hash(config):
        raise ConfigError(
            f"{path} was written by a run with another config (compare {CONFIG_NAME} in that run's folder). To start "
            "from its weights, export it and set encoder.init_from."
        )
    recorded = [state.extra.get(key, {}) for key in ("tokenizers", "backbones")]
    if not all(isinstance(each, dict) for each in recorded):
        raise CheckpointError(f"{path}: `extra` of the trainer's state has no digests. {_ANOTHER}")
    before, now = read_manifest(path).world_size, dist.world_size()
    if config.loss.normalize == "rank_mean" and before != now:
        raise ConfigError(
            f"{path} was written by {before} ranks, but this run has {now}: with loss.normalize=rank_mean every rank "
            f"has the same weight, so the loss would change. Resume with {before} ranks, or start a new run from "
            "its weights (export it and set encoder.init_from)."
        )
    if state.data_fingerprint != inputs.data:
        raise DataError(
            f"the data differ from the data that {path} was trained on: shards, source weights or their order have "
            "changed. Restore them, or start a new run from its weights (export it and set encoder.init_from)."
        )
    changed = _changed(recorded[0], inputs.tokenizers)
    if changed:
        raise TokenizerError(
            f"the tokenizer of {changed} differs from the one that {path} was trained with: its files have changed, so "
            "token ids or chat turns have another meaning. Restore the files (key `tokenizer`)."
        )
    changed = _changed(recorded[1], inputs.backbones)
    if changed:
        raise WeightsError(
            f"the weights at {changed} differ from those that {path} was trained with: the path leads to another "
            "model, or to the same model in another format or split. Name the files that the run was started with."
        )


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Comma-separated keys whose values differ or exist on one side only."""
    return ", ".join(key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key))

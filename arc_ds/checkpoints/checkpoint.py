"""The checkpoints of a run: find a whole one, load it, delete old ones. `writer.py` writes them.

    RUN/checkpoints/step_000100/   shards.json, shard_00000.safetensors ..., trainer.json, rng_00000.json ...,
                                   manifest.json, kept_ports.safetensors if the run keeps ports unchanged
    RUN/checkpoints/latest         name of the newest checkpoint

Only trained weights are saved (`shards.py`). `trainer.json` names the source of frozen ones. The files are safetensors
and JSON. No pickle is run, not even in earlier checkpoints, which hold DeepSpeed's files.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arc_ds.checkpoints.manifest import is_count, read_json, read_manifest
from arc_ds.checkpoints.reshard import restore_engine
from arc_ds.checkpoints.rng import restore_rng
from arc_ds.checkpoints.shards import open_shards
from arc_ds.errors import CheckpointError
from arc_ds.system import dist
from arc_ds.system.checksums import find_faults

logger = logging.getLogger(__name__)

LATEST_NAME = "latest"
TRAINER_NAME = "trainer.json"
_STEP_FOLDER = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """The state that a run needs to continue, apart from weights and optimizer.

    step: number of optimizer steps done.
    data_position: global index of the next sample.
    data_fingerprint: identifies the data; a run with other data is refused.
    config_hash: identifies the config; a run with another config is refused.
    mlflow_run_id: the MLflow run to continue.
    versions: versions of the programs that wrote the checkpoint.
    extra: any JSON values (counters, windows of a hook).
    """

    step: int
    data_position: int
    data_fingerprint: str
    config_hash: str
    mlflow_run_id: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


class CheckpointRemoved(CheckpointError):
    """A checkpoint that was removed while it was read."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """A block that reads a checkpoint that its run may remove.

    Checkpoints are verified first and read later. If the checkpoint no longer
    exists after an error, this raises CheckpointRemoved.
    """
    try:
        yield
    except Exception as error:
        if path.is_dir():
            raise
        raise CheckpointRemoved(
            f"{path} was removed while it was read; a run removes its old checkpoints. Name a checkpoint that is still "
            "there. To keep more of them, raise checkpoint.keep_last in that run, or set checkpoint.keep_every."
        ) from error


def find_resumable(directory: Path) -> Path | None:
    """Return the newest whole checkpoint in `directory`, or None; the same on every rank. A collective.

    Each rank verifies a part of the files. A warning names every incomplete or corrupted checkpoint that is skipped,
    with the file at fault. Checkpoints are ordered by step; `latest` is only information for people and other programs.
    """
    for path in dist.broadcast_object(list_checkpoints(directory)[::-1]):  # hosts may see a folder differently
        faults = check_checkpoint(path)
        if not faults:
            return path
        if dist.is_main():
            logger.warning("skipping the checkpoint %s: %s", path, "; ".join(faults))
    return None


def check_checkpoint(path: Path) -> list[str]:
    """List the faults of a checkpoint; the same list on every rank, empty if it is whole. A collective."""
    try:
        files = read_manifest(path).files
        faults = find_faults(path, files[dist.rank() :: dist.world_size()])
    except CheckpointError as error:
        faults = [str(error)]
    return sorted({fault for part in dist.gather_objects(faults) for fault in part})


def load_checkpoint(engine: Any, path: Path) -> TrainerState:
    """Load weights, optimizer and random states into a fresh engine and return the trainer's state. Collective.

    path: a whole checkpoint (see `check_checkpoint`); its checksums are not verified here.

    If another number of ranks wrote the checkpoint, the shards are cut anew (values stay bit-exact), and the random
    states are left unchanged, because they belong to ranks. The engine must not have trained yet.

    Raises CheckpointError if the checkpoint belongs to another model, and CheckpointRemoved if it vanishes.
    """
    with reading(path):
        with dist.fail_together():
            manifest, state = read_manifest(path), read_trainer_state(path)
            shards = open_shards(path, manifest.world_size)
            if manifest.world_size == dist.world_size():
                rng = path / rng_name(dist.rank())
                restore_rng(read_json(rng), rng)
        restore_engine(engine, shards, path)
        if manifest.world_size != dist.world_size():
            logger.info("%s was written by %d ranks and is read by %d", path, manifest.world_size, dist.world_size())
        return state


def read_trainer_state(path: Path) -> TrainerState:
    """Read the trainer's state of a checkpoint, without an engine. Does not verify checksums."""
    plain = read_json(path / TRAINER_NAME)
    try:
        state = TrainerState(**plain)
        if not is_count(state.step) or not isinstance(state.extra, dict):
            raise TypeError("`step` is no count, or `extra` is no object")
        return state
    except TypeError as error:
        raise CheckpointError(
            f"{path / TRAINER_NAME} is not the state of a trainer: {error}. Use another checkpoint of the run."
        ) from error


def list_checkpoints(directory: Path) -> list[Path]:
    """List the step folders in a directory, oldest step first, whole or not. Empty if the directory does not exist."""
    found = [path for path in directory.glob("step_*") if path.is_dir() and _STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Return the step in a checkpoint folder's name. Raises CheckpointError for any other name."""
    match = _STEP_FOLDER.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not a checkpoint folder: expected a name like step_000100.")
    return int(match.group(1))


def prune_checkpoints(directory: Path, *, keep_last: int, keep_every: int) -> None:
    """Delete old checkpoints. Call it in one process only.

    Keeps the `keep_last` newest ones and those whose step is a multiple of `keep_every`. A folder without a manifest,
    or with a file of another size than its manifest says, is neither counted nor deleted: it may not be ours.
    """
    ours = [path for path in list_checkpoints(directory) if is_whole_by_size(path)]
    for path in ours[:-keep_last]:
        if keep_every and step_of(path) % keep_every == 0:
            continue
        # Rename first: a kill during the deletion must not leave an incomplete step folder.
        trash = path.with_name(f".trash-{path.name}")
        try:
            os.replace(path, trash)
        except OSError as error:
            logger.warning("%s cannot be removed: %s. Remove it yourself.", path, error.strerror)
        else:
            remove_leftover(trash)


def remove_leftover(folder: Path) -> None:
    """Delete a folder of the writer; warn if it cannot be deleted. On NFS this fails while a reader has a file open."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        logger.warning("%s cannot be deleted now: %s. The next save tries again.", folder, error.strerror)


def is_whole_by_size(path: Path) -> bool:
    """Whether the manifest can be read and all its files have their sizes. Checksums are not verified."""
    try:
        return all((path / entry.path).stat().st_size == entry.size for entry in read_manifest(path).files)
    except (CheckpointError, OSError):
        return False


def rng_name(rank: int) -> str:
    """Name of the file with a rank's random states."""
    return f"rng_{rank:05d}.json"

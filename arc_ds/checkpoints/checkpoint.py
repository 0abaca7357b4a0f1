"""Atomic checkpoints of the whole state of a run.

    RUN/checkpoints/step_000100/   DeepSpeed's ZeRO shards, trainer.json, rng_00000.json ..., manifest.json,
                                   kept_ports.safetensors if the run keeps ports unchanged
    RUN/checkpoints/latest         name of the newest checkpoint

DeepSpeed publishes `latest` before all shards exist, overwrites in place and has no checksums. This module wraps it:

1. All ranks write into a temporary folder.
2. Each rank syncs its own files to disk and computes their checksums.
3. Rank 0 gathers the checksums, writes the manifest, renames the folder and finally updates `latest`.

If the run is killed at any point, the previous checkpoint can still be loaded. The error paths do not clean up: an
exception leaves a temporary folder, exactly as a kill does, and the next save removes it.

All ranks must see the same file system under the run folder. A run on several hosts needs a shared file system.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from arc_ds.checkpoints.kept_ports import write_kept_ports
from arc_ds.checkpoints.manifest import Manifest, read_manifest, seal_file, write_manifest
from arc_ds.checkpoints.reshard import load_resharded
from arc_ds.checkpoints.rng import capture_rng, restore_rng
from arc_ds.errors import CheckpointError
from arc_ds.system import dist
from arc_ds.system.checksums import FileEntry, find_faults
from arc_ds.system.files import output, sync_folder, write_whole

logger = logging.getLogger(__name__)

LATEST_NAME = "latest"
_TRAINER_NAME = "trainer.json"
_STEP_FOLDER = re.compile(r"step_(\d{6,})")
_RANK_IN_NAME = re.compile(r"(?:pp_rank_|rng_|offloaded_tensors/rank)(\d+)")


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

    Checkpoints are verified first and read later, by libraries that raise their own errors. If the checkpoint no longer
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


def save_checkpoint(
    engine: Any,
    directory: Path,
    trainer_state: TrainerState,
    *,
    keep_last: int,
    keep_every: int,
    kept: Mapping[str, Tensor] | None = None,
) -> Path:
    """Save the engine and the trainer's state as `directory/step_NNNNNN` and return that folder. A collective.

    engine: a DeepSpeed engine.
    keep_last: number of newest whole checkpoints to keep, at least 1.
    keep_every: also keep checkpoints whose step is a multiple of this number (0: none).
    kept: tensors of ports that the run keeps unchanged; rank 0's are saved (`kept_ports.py`).

    Raises CheckpointError if a whole checkpoint of this step exists; a damaged one is renamed and kept. Raises
    StorageError if the checkpoint cannot be written.
    """
    step = trainer_state.step
    final = directory / f"step_{step:06d}"
    temporary = directory / f".tmp-{final.name}"
    written = partial(output, final, after=partial(_remains, directory))
    _check_absent(final)
    with dist.fail_together(), written():
        if dist.is_main():
            _make_room(directory, final)
    with written():  # contains collectives
        engine.save_checkpoint(str(directory), tag=temporary.name, save_latest=False)
    own: tuple[FileEntry, ...] = ()
    with dist.fail_together(), written():
        _write_own_state(temporary, trainer_state)
        if kept and dist.is_main():
            write_kept_ports(temporary, kept)
        own = tuple(seal_file(temporary, path) for path in _own_files(temporary))
    files = tuple(sorted((entry for part in dist.gather_objects(own) for entry in part), key=lambda entry: entry.path))
    with dist.fail_together(), written():
        if dist.is_main():
            _publish(temporary, final, Manifest(step=step, world_size=dist.world_size(), files=files))
            prune_checkpoints(directory, keep_last=keep_last, keep_every=keep_every)
    return final


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
    """Load weights, optimizer and random states into a fresh engine and return the trainer's state. A collective.

    path: a whole checkpoint (see `check_checkpoint`): it contains pickles, and their checksums are not verified here.

    If another number of ranks wrote the checkpoint, the ZeRO-3 shards are resharded
    (values stay bit-exact) and the random states are left unchanged, because they belong to ranks. Frozen parameters
    of the engine are loaded too. DeepSpeed requires an engine that has neither saved nor trained yet.

    Raises CheckpointError if the checkpoint belongs to another model, and CheckpointRemoved if it vanishes.
    """
    with reading(path):
        manifest = read_manifest(path)
        if manifest.world_size == dist.world_size():
            _load_shards(engine, path)
            restore_rng(json.loads((path / _rng_name(dist.rank())).read_text(encoding="utf-8")))
        else:
            logger.info("%s was written by %d ranks and is read by %d", path, manifest.world_size, dist.world_size())
            load_resharded(engine, path, manifest.world_size)
        return read_trainer_state(path)


def read_trainer_state(path: Path) -> TrainerState:
    """Read the trainer's state of a checkpoint, without an engine. Does not verify checksums."""
    try:
        return TrainerState(**json.loads((path / _TRAINER_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path / _TRAINER_NAME} cannot be read: {error}") from error


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
    ours = [path for path in list_checkpoints(directory) if _sizes_match(path)]
    for path in ours[:-keep_last]:
        if keep_every and step_of(path) % keep_every == 0:
            continue
        # Rename first: a kill during the deletion must not leave an incomplete step folder.
        trash = path.with_name(f".trash-{path.name}")
        os.replace(path, trash)
        shutil.rmtree(trash)


def _check_absent(final: Path) -> None:
    """Raise CheckpointError if the checkpoint exists and is whole. A collective."""
    if dist.broadcast_object(final.exists()) and not check_checkpoint(final):
        raise CheckpointError(
            f"{final} already holds a whole checkpoint and is not overwritten. "
            "Resume from it (checkpoint.resume=auto), or choose another run_dir."
        )


def _make_room(directory: Path, final: Path) -> None:
    """Prepare the directory for a save."""
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in [*directory.glob(".tmp-step_*"), *directory.glob(".trash-step_*")]:
        shutil.rmtree(leftover)
    if final.exists():
        names = (f"damaged-{number}-{final.name}" for number in itertools.count(1))
        aside = next(name for name in names if not (directory / name).exists())
        os.replace(final, directory / aside)
        logger.warning("the damaged checkpoint %s is kept as %s", final, aside)


def _remains(directory: Path) -> str:
    """The checkpoint that a failed save leaves, in words."""
    whole = [path for path in list_checkpoints(directory) if _sizes_match(path)]
    return f"{whole[-1].name} is whole, and the run resumes from it." if whole else "The run has no checkpoint yet."


def _write_own_state(folder: Path, trainer_state: TrainerState) -> None:
    (folder / _rng_name(dist.rank())).write_text(json.dumps(capture_rng()), encoding="utf-8")
    if dist.is_main():
        state = json.dumps(asdict(trainer_state), indent=1) + "\n"
        (folder / _TRAINER_NAME).write_text(state, encoding="utf-8")


def _own_files(folder: Path) -> list[Path]:
    """The files that this rank wrote: those with its number in the name. Rank 0 also owns all files without one."""

    def owner(path: Path) -> int:
        match = _RANK_IN_NAME.search(path.relative_to(folder).as_posix())
        return int(match.group(1)) if match else 0

    return [path for path in sorted(folder.rglob("*")) if path.is_file() and owner(path) == dist.rank()]


def _publish(temporary: Path, final: Path, manifest: Manifest) -> None:
    for folder in {(temporary / entry.path).parent for entry in manifest.files}:
        sync_folder(folder)
    write_manifest(temporary, manifest)
    os.replace(temporary, final)
    sync_folder(final.parent)
    write_whole(final.parent / LATEST_NAME, final.name + "\n")


def _load_shards(engine: Any, path: Path) -> None:
    try:
        loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} does not fit this run's model or optimizer: {error}. Use the config that wrote the "
            "checkpoint, or another run_dir."
        ) from error
    if loaded is None:
        raise CheckpointError(f"DeepSpeed found no shards in {path}: it was written by another kind of engine.")


def _sizes_match(path: Path) -> bool:
    try:
        return all((path / entry.path).stat().st_size == entry.size for entry in read_manifest(path).files)
    except (CheckpointError, OSError):
        return False


def _rng_name(rank: int) -> str:
    return f"rng_{rank:05d}.json"

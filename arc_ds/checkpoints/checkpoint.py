"""Checkpoints: all of a run's state or nothing of it (design 9).

    RUN/checkpoints/step_000100/   ZeRO shards of DeepSpeed, trainer.json, rng_00000.json ..., manifest.json
    RUN/checkpoints/latest         name of the newest one

DeepSpeed publishes `latest` before all shards exist, overwrites in place and has no checksums, so this wraps it. All
ranks write under a temporary name; each rank brings its own files to the disk and sums them; rank 0 gathers the sums,
writes the manifest, renames the folder, and moves `latest` last. A kill at any instant leaves the checkpoint before
it loadable. There is no clean-up in the error paths, so that an exception leaves what a kill leaves: a temporary
folder, which the next save removes.

All ranks must see the same file system under the run folder; several hosts need a shared one.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from arc_ds.checkpoints.manifest import (
    FileEntry,
    Manifest,
    find_faults,
    read_manifest,
    seal_file,
    write_manifest,
)
from arc_ds.checkpoints.reshard import load_resharded
from arc_ds.checkpoints.rng import capture_rng, restore_rng
from arc_ds.errors import CheckpointError
from arc_ds.system import dist
from arc_ds.system.files import sync_folder, write_whole

logger = logging.getLogger(__name__)

LATEST_NAME = "latest"
_TRAINER_NAME = "trainer.json"
_STEP_FOLDER = re.compile(r"step_(\d{6,})")
_RANK_IN_NAME = re.compile(r"(?:pp_rank_|rng_|offloaded_tensors/rank)(\d+)")


@dataclass(frozen=True, kw_only=True)
class TrainerState:
    """What a run needs beside weights and optimizer to go on where it was.

    step: optimizer steps done. data_position: global index of the next sample (design 7). data_fingerprint,
    config_hash: what the run was, to refuse another one. mlflow_run_id: the run to continue. versions: of the programs
    that wrote it. extra: anything that JSON holds (counters, windows of a hook).
    """

    step: int
    data_position: int
    data_fingerprint: str
    config_hash: str
    mlflow_run_id: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)


def save_checkpoint(
    engine: Any, directory: Path, step: int, trainer_state: TrainerState, keep_last: int, keep_every: int
) -> Path:
    """Save the engine and the trainer's state as `directory/step_NNNNNN`; a collective. Returns that folder.

    engine: a DeepSpeed engine. keep_last (>= 1): how many of the newest whole ones stay; keep_every: those whose step
    it divides stay too (0: none). CheckpointError where a whole checkpoint of that step is already there; a damaged
    one is set aside under another name.
    """
    if step != trainer_state.step:
        raise ValueError(f"the state of step {trainer_state.step} cannot be saved as step {step}")
    if keep_last < 1:
        raise ValueError(f"keep_last must be at least 1, got {keep_last}")
    final = directory / step_name(step)
    temporary = directory / f".tmp-{final.name}"
    _make_room(directory, final, temporary)
    engine.save_checkpoint(str(directory), tag=temporary.name, save_latest=False)
    _at_phase("shards written")
    _write_own_state(temporary, trainer_state)
    _at_phase("state written")
    own = tuple(seal_file(temporary, path) for path in _own_files(temporary))
    files = tuple(sorted((entry for part in dist.gather_objects(own) for entry in part), key=lambda entry: entry.path))
    if dist.is_main():
        _publish(temporary, final, Manifest(step=step, world_size=dist.world_size(), files=files))
        prune_checkpoints(directory, keep_last=keep_last, keep_every=keep_every)
    dist.barrier()
    return final


def find_resumable(directory: Path) -> Path | None:
    """The newest whole checkpoint in `directory`, the same on every rank, or None; a collective.

    The files are checked by all ranks, each a part. One that is torn or corrupted is named in a warning, with the
    file, and passed over. The order is that of the steps: `latest` is a note for people and other programs.
    """
    for path in _everywhere(lambda: list_checkpoints(directory)[::-1]):
        faults = check_checkpoint(path)
        if not faults:
            return path
        if dist.is_main():
            logger.warning("passing over the checkpoint %s: %s", path, "; ".join(faults))
    return None


def check_checkpoint(path: Path) -> list[str]:
    """What is wrong with a checkpoint, the same list on every rank, empty where it is whole; a collective."""
    try:
        files = read_manifest(path).files
        faults = find_faults(path, files[dist.rank() :: dist.world_size()])
    except CheckpointError as error:
        faults = [str(error)]
    return sorted({fault for part in dist.gather_objects(faults) for fault in part})


def load_checkpoint(engine: Any, path: Path) -> TrainerState:
    """Load weights, optimizer and random states into a fresh engine; a collective. Returns the trainer's state.

    The sums are checked first. Written by another number of ranks, the ZeRO-3 shards are cut anew (bit-exact values);
    the random states then stay as they are, since they belong to ranks. Frozen parameters of the engine are loaded too.
    CheckpointError where the checkpoint is not whole or of another model. The engine must not have saved or trained
    before: DeepSpeed wants a pristine one.
    """
    faults = check_checkpoint(path)
    if faults:
        raise CheckpointError(
            f"{path} is not a whole checkpoint: {'; '.join(faults)}. Resume from another one (checkpoint.resume=PATH)."
        )
    manifest = read_manifest(path)
    if manifest.world_size == dist.world_size():
        _load_shards(engine, path)
        restore_rng(json.loads((path / _rng_name(dist.rank())).read_text(encoding="utf-8")))
    else:
        logger.info("%s was written by %d ranks and is read by %d", path, manifest.world_size, dist.world_size())
        load_resharded(engine, path, manifest.world_size)
    return read_trainer_state(path)


def read_trainer_state(path: Path) -> TrainerState:
    """The trainer's state in a checkpoint; for a look before there is an engine. Checks no sums."""
    try:
        return TrainerState(**json.loads((path / _TRAINER_NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path / _TRAINER_NAME} cannot be read: {error}") from error


def list_checkpoints(directory: Path) -> list[Path]:
    """The step folders in a directory, oldest step first, whole or not; empty where there is no directory."""
    found = [path for path in directory.glob("step_*") if path.is_dir() and _STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step_{step:06d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name; CheckpointError where it is none."""
    match = _STEP_FOLDER.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not a checkpoint folder: expected a name like {step_name(100)}.")
    return int(match.group(1))


def prune_checkpoints(directory: Path, *, keep_last: int, keep_every: int) -> list[Path]:
    """Delete whole checkpoints beyond the `keep_last` newest, but those whose step `keep_every` divides. One process.

    What has no manifest or files of other sizes than it says is neither counted nor deleted: it is not ours to judge.
    Returns what was deleted.
    """
    whole = [path for path in list_checkpoints(directory) if _sizes_match(path)]
    doomed = [path for path in whole[:-keep_last] if not (keep_every and step_of(path) % keep_every == 0)]
    for path in doomed:
        # First out of sight by one rename: a kill within the deletion must not leave a torn step folder.
        trash = path.with_name(f".trash-{path.name}")
        os.replace(path, trash)
        shutil.rmtree(trash)
    return doomed


def _make_room(directory: Path, final: Path, temporary: Path) -> None:
    """Rank 0 prepares the directory for a save; what it finds wrong is raised on all ranks."""
    if _everywhere(final.exists) and not check_checkpoint(final):
        raise CheckpointError(
            f"{final} already holds a whole checkpoint and is not overwritten. "
            "Resume from it (checkpoint.resume=auto), or choose another run_dir."
        )
    if dist.is_main():
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in [*directory.glob(".tmp-step_*"), *directory.glob(".trash-step_*")]:
            shutil.rmtree(leftover)
        if final.exists():
            _set_aside(final)
    dist.barrier()


def _set_aside(path: Path) -> None:
    number = 1
    while (aside := path.with_name(f"damaged-{number}-{path.name}")).exists():
        number += 1
    os.replace(path, aside)
    logger.warning("the damaged checkpoint %s is kept as %s", path, aside.name)


def _write_own_state(folder: Path, trainer_state: TrainerState) -> None:
    rank = dist.rank()
    (folder / _rng_name(rank)).write_text(json.dumps(capture_rng()), encoding="utf-8")
    if rank == 0:
        state = {**asdict(trainer_state), "versions": dict(trainer_state.versions), "extra": dict(trainer_state.extra)}
        (folder / _TRAINER_NAME).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def _own_files(folder: Path) -> list[Path]:
    """The files that this rank has written: those with its number in their name, and on rank 0 all others."""
    rank = dist.rank()
    mine = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        match = _RANK_IN_NAME.search(path.relative_to(folder).as_posix())
        if (int(match.group(1)) if match else 0) == rank:
            mine.append(path)
    return mine


def _publish(temporary: Path, final: Path, manifest: Manifest) -> None:
    for folder in {(temporary / entry.path).parent for entry in manifest.files}:
        sync_folder(folder)
    _at_phase("files sealed")
    write_manifest(temporary, manifest)
    _at_phase("manifest written")
    os.replace(temporary, final)
    sync_folder(final.parent)
    _at_phase("folder renamed")
    write_whole(final.parent / LATEST_NAME, final.name + "\n")
    _at_phase("latest moved")


def _load_shards(engine: Any, path: Path) -> None:
    try:
        loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} does not fit this run's model or optimizer: {error}. Give the run the config that wrote the "
            "checkpoint, or another run_dir."
        ) from error
    if loaded is None:
        raise CheckpointError(f"DeepSpeed found no shards in {path}: it was written by another kind of engine.")


def _sizes_match(path: Path) -> bool:
    try:
        entries: tuple[FileEntry, ...] = read_manifest(path).files
        return all((path / entry.path).stat().st_size == entry.size for entry in entries)
    except (CheckpointError, OSError):
        return False


def _rng_name(rank: int) -> str:
    return f"rng_{rank:05d}.json"


def _at_phase(_name: str) -> None:
    """Called between the phases of a save; tests put a fault here."""


def _everywhere(decide: Callable[[], Any]) -> Any:
    """Rank 0's answer on all ranks: what is looked up in a folder must not differ between hosts."""
    return dist.broadcast_object(decide() if dist.is_main() else None)

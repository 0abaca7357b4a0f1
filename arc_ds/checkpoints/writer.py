"""Writing of checkpoints in the background: training goes on while a thread of each rank writes.

1. All ranks prepare the folder, and each copies its state to host memory (`CheckpointWriter.save`).
2. A thread of each rank writes its files under a temporary name, syncs and hashes them, and leaves their checksums in
   that folder as its part.
3. When the parts of all ranks are there, the thread of rank 0 writes the manifest, renames the folder and finally
   updates `latest`. A shared file system may show the parts of other hosts late: NFS after up to a minute.

The threads use no collective. The next save, or `finish`, waits for the save in flight and raises its error on all
ranks. If the run is killed at any point, the previous checkpoint can still be loaded. A save that fails removes its
files. A kill leaves a temporary folder, which the next save removes.

All ranks must see the same file system under the run folder. A run on several hosts needs a shared file system.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from arc_ds.checkpoints.checkpoint import (
    LATEST_NAME,
    TRAINER_NAME,
    TrainerState,
    check_checkpoint,
    is_whole_by_size,
    list_checkpoints,
    prune_checkpoints,
    remove_leftover,
    rng_name,
)
from arc_ds.checkpoints.kept_ports import KEPT_NAME, write_kept_ports
from arc_ds.checkpoints.manifest import Manifest, seal_file, write_manifest
from arc_ds.checkpoints.reshard import engine_state
from arc_ds.checkpoints.rng import capture_rng
from arc_ds.checkpoints.shards import EngineState, write_shards
from arc_ds.errors import CheckpointError, StorageError
from arc_ds.system import dist
from arc_ds.system.checksums import FileEntry
from arc_ds.system.device import start_host_copies
from arc_ds.system.files import output, sync, write_whole

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_PATIENCE_S = 90.0  # for the parts of other ranks, once all have written theirs, or after an error


class CheckpointWriter:
    """Writes the checkpoints of a run to a directory, at most one at a time.

    directory: parent of the step folders.
    keep_last: number of newest whole checkpoints to keep, at least 1.
    keep_every: also keep checkpoints whose step is a multiple of this number (0: none).
    asynchronous: whether `save` returns before the checkpoint is written. This takes host memory for a copy of the
        rank's state, which is kept for the next save: 12 bytes for each trained parameter, divided by the ranks.
    """

    def __init__(self, directory: Path, *, keep_last: int, keep_every: int, asynchronous: bool) -> None:
        self._directory = directory
        self._prune = partial(prune_checkpoints, directory, keep_last=keep_last, keep_every=keep_every)
        self._asynchronous = asynchronous
        self._buffers: dict[str, Tensor] = {}
        self._save: _Save | None = None

    @property
    def has_failed(self) -> bool:
        """Whether the save in flight has failed on this rank. `finish` raises its error on all ranks."""
        return self._save is not None and self._save.error is not None

    def save(self, engine: Any, trainer_state: TrainerState, kept: Mapping[str, Tensor] | None = None) -> Path:
        """Save the engine and the trainer's state as `directory/step_NNNNNN` and return that folder. Collective.

        Waits for the save in flight first, like `finish`.

        kept: tensors of ports that the run keeps unchanged; rank 0's are saved (`kept_ports.py`).

        Raises CheckpointError if a whole checkpoint of this step exists; a damaged one is renamed and kept. Raises
        StorageError if the checkpoint cannot be written.
        """
        self.finish()
        final = self._directory / f"step_{trainer_state.step:06d}"
        _check_absent(final)
        temporary = final.with_name(f".tmp-{final.name}")
        written = partial(output, final, after=partial(_remains, self._directory))
        with dist.fail_together(), written():
            if dist.is_main():
                _make_room(self._directory, final)
                temporary.mkdir()
        state, wait_for_copies = engine_state(engine), None
        if self._asynchronous:
            wait_for_copies = start_host_copies(state.tensors, self._buffers)
            state = replace(state, tensors={name: self._buffers[name] for name in state.tensors})
        rng = json.dumps(capture_rng())

        def write() -> None:
            if wait_for_copies is not None:
                wait_for_copies()
            _leave_part(temporary, _write_part(temporary, state, trainer_state, rng, kept or {}))

        def publish(parts: list[list[FileEntry]]) -> None:
            files = tuple(sorted((entry for part in parts for entry in part), key=lambda entry: entry.path))
            _publish(temporary, final, Manifest(step=trainer_state.step, world_size=len(parts), files=files))
            self._prune()
            logger.info("saved %s", final)

        self._save = _Save(temporary, write, publish, written)
        if not self._asynchronous:
            self.finish()
        return final

    def finish(self) -> None:
        """Wait until the save in flight is whole on all ranks. If it failed, all ranks raise its error. Collective."""
        save = self._save
        if save is None:
            return
        save.own_part.wait()
        if any(dist.gather_objects(save.error is not None)):
            save.abort.set()
        save.deadline = time.monotonic() + _PATIENCE_S
        save.thread.join()
        self._save = None
        try:
            dist.raise_together(save.error)
        except Exception:
            if dist.is_main():
                shutil.rmtree(save.temporary, ignore_errors=True)
            raise

    def close(self) -> None:
        """Wait for the save in flight without the other ranks, after an error. Rank 0 gives up if parts are missing."""
        save, self._save = self._save, None
        if save is not None:
            save.deadline = time.monotonic() + _PATIENCE_S
            save.thread.join()


class _Save:
    """A save in flight on this rank.

    write: writes this rank's files and leaves their entries as its part.
    publish: makes the checkpoint of the parts of all ranks; called on rank 0.
    written: context of both, which names the checkpoint if they fail (`files.output`).
    own_part: set when this rank's part is written or has failed.
    abort: set it to end the wait for other ranks' parts.
    deadline: of that wait, by `time.monotonic`.
    """

    def __init__(
        self,
        temporary: Path,
        write: Callable[[], None],
        publish: Callable[[list[list[FileEntry]]], None],
        written: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.temporary = temporary
        self.error: Exception | None = None
        self.own_part, self.abort = threading.Event(), threading.Event()
        self.deadline = math.inf
        self._write, self._publish, self._written = write, publish, written
        self._world_size = dist.world_size()
        self.thread = threading.Thread(target=self._run, daemon=True, name="checkpoint")
        self.thread.start()

    def _run(self) -> None:
        try:
            with self._written():
                self._write()
        except Exception as error:
            self.error = error
            _remove_own_files(self.temporary)
            with suppress(OSError):  # then rank 0 waits until `finish`
                _leave_part(self.temporary, None)
        finally:
            self.own_part.set()
        if dist.is_main():
            try:
                with self._written():
                    self._publish_when_whole()
            except Exception as error:
                self.error = self.error or error

    def _publish_when_whole(self) -> None:
        paths = [_part_path(self.temporary, rank) for rank in range(self._world_size)]

        def missing_ranks() -> list[int]:
            listed = set(os.listdir(self.temporary))  # asks the server of NFS; a look at one name may not
            return [rank for rank, path in enumerate(paths) if path.name not in listed]

        while missing := missing_ranks():
            if self.abort.wait(_POLL_S):
                return
            if time.monotonic() > self.deadline:
                raise StorageError(
                    f"rank {missing[0]} has written its part, but {socket.gethostname()} does not see it in "
                    f"{self.temporary}. All hosts must see the same files there. Give a run_dir on a file system that "
                    "they share."
                )
        parts = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        if None in parts:
            shutil.rmtree(self.temporary, ignore_errors=True)  # frees the space before the next save
            return
        for path in paths:
            path.unlink()
        self._publish([[FileEntry(**entry) for entry in part] for part in parts])


def _check_absent(final: Path) -> None:
    """Raise CheckpointError if the checkpoint exists and is whole. Collective."""
    if dist.broadcast_object(final.exists()) and not check_checkpoint(final):
        raise CheckpointError(
            f"{final} already holds a whole checkpoint and is not overwritten. "
            "Resume from it (checkpoint.resume=auto), or choose another run_dir."
        )


def _make_room(directory: Path, final: Path) -> None:
    """Prepare the directory for a save."""
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in [*directory.glob(".tmp-step_*"), *directory.glob(".trash-step_*")]:
        remove_leftover(leftover)
    if final.exists():
        names = (f"damaged-{number}-{final.name}" for number in itertools.count(1))
        aside = next(name for name in names if not (directory / name).exists())
        os.replace(final, directory / aside)
        logger.warning("the damaged checkpoint %s is kept as %s", final, aside)


def _remains(directory: Path) -> str:
    """The checkpoint that a failed save leaves, in words."""
    whole = [path for path in list_checkpoints(directory) if is_whole_by_size(path)]
    return f"{whole[-1].name} is whole, and the run resumes from it." if whole else "The run has no checkpoint yet."


def _write_part(
    folder: Path, state: EngineState, trainer_state: TrainerState, rng: str, kept: Mapping[str, Tensor]
) -> list[FileEntry]:
    """Write this rank's files durably and return their entries."""
    rank = dist.rank()
    files = write_shards(folder, rank, state)
    names = [rng_name(rank)]
    (folder / names[0]).write_text(rng, encoding="utf-8")
    if rank == 0:
        names.append(TRAINER_NAME)
        (folder / TRAINER_NAME).write_text(json.dumps(asdict(trainer_state), indent=1) + "\n", encoding="utf-8")
        if kept:
            names.append(KEPT_NAME)
            write_kept_ports(folder, kept)
    return files + [seal_file(folder, folder / name) for name in names]


def _part_path(folder: Path, rank: int) -> Path:
    return folder / f"part_{rank:05d}.json"


def _leave_part(folder: Path, files: list[FileEntry] | None) -> None:
    """Leave the entries of this rank's files for rank 0; None if it could not write them.

    The last act of a rank in the folder is this rename: rank 0 renames the folder once it sees the parts of all ranks.
    """
    path = _part_path(folder, dist.rank())
    partial_path = path.with_name(f".{path.name}.partial")
    partial_path.write_text(json.dumps(files and [asdict(entry) for entry in files]), encoding="utf-8")
    partial_path.replace(path)


def _remove_own_files(folder: Path) -> None:
    with suppress(OSError):
        for path in folder.glob(f"*_{dist.rank():05d}.*"):
            path.unlink()


def _publish(temporary: Path, final: Path, manifest: Manifest) -> None:
    sync(temporary)
    write_manifest(temporary, manifest)
    os.replace(temporary, final)
    sync(final.parent)
    write_whole(final.parent / LATEST_NAME, final.name + "\n")

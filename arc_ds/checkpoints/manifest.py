"""The manifest of a checkpoint: name, size and checksum of every file in its folder.

A checkpoint is *whole* if its manifest can be read and matches its own digest, and every listed file has the recorded
size and checksum. Without this check, a flipped byte in a shard would be loaded silently.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from arc_ds.errors import CheckpointError
from arc_ds.system.checksums import FileEntry, hash_file
from arc_ds.system.files import sync, write_whole
from arc_ds.system.user_files import read_user_json

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The files of a checkpoint, its step and the number of ranks that wrote it."""

    step: int
    world_size: int
    files: tuple[FileEntry, ...]


def seal_file(folder: Path, path: Path) -> FileEntry:
    """Sync a file to disk and return its entry. Call it in the process that wrote the file."""
    sync(path)
    return FileEntry(path=path.relative_to(folder).as_posix(), size=path.stat().st_size, xxh128=hash_file(path))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` durably. Call it last: a folder without a manifest is not a checkpoint."""
    content = {"version": MANIFEST_VERSION, **asdict(manifest)}
    write_whole(folder / MANIFEST_NAME, json.dumps({**content, "digest": _digest(content)}, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`. Raises CheckpointError if it is missing, truncated, altered or of an unknown version."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a whole checkpoint: it has no {MANIFEST_NAME}.")
    content = read_json(path)
    if not isinstance(content, dict) or content.pop("digest", None) != _digest(content):
        raise CheckpointError(f"{path} does not match its own digest: the checkpoint is damaged.")
    if (found := content.get("version")) != MANIFEST_VERSION:
        raise CheckpointError(
            f"{path} has version {found}, but this program reads version {MANIFEST_VERSION}. Resume with the release "
            "that wrote it."
        )
    try:
        files = tuple(FileEntry(**entry) for entry in content["files"])
        manifest = Manifest(step=content["step"], world_size=content["world_size"], files=files)
        paths = [PurePosixPath(entry.path) for entry in files]
    except (LookupError, TypeError) as error:
        raise CheckpointError(f"{path} does not list files ({error!r}): the checkpoint is damaged.") from error
    if not (is_count(manifest.step) and is_count(manifest.world_size)):
        raise CheckpointError(f"{path} has no step or no number of ranks: the checkpoint is damaged.")
    if outside := [str(each) for each in paths if each.is_absolute() or ".." in each.parts]:
        raise CheckpointError(f"{path} lists {outside[0]}, which is not in its folder: the checkpoint is damaged.")
    return manifest


def manifest_digest(folder: Path) -> str:
    """The digest of a checkpoint's manifest. It identifies the checkpoint, because the manifest has all checksums."""
    read_manifest(folder)
    return str(read_json(folder / MANIFEST_NAME)["digest"])


def read_json(path: Path) -> Any:
    """Read a JSON file of a checkpoint. Raises CheckpointError if it is missing, or is not JSON."""
    return read_user_json(path, CheckpointError, remedy="Use another checkpoint of the run.")


def is_count(value: object) -> bool:
    """Whether a value from a file is a whole number of at least 0."""
    return type(value) is int and value >= 0


def _digest(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()

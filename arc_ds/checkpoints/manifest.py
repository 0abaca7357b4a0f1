"""The manifest of a checkpoint: name, size and checksum of every file in its folder.

A checkpoint is *whole* if its manifest can be read and matches its own digest, and every listed file has the recorded
size and checksum. Without this check, a flipped byte in a shard would be loaded silently.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from arc_ds.errors import CheckpointError
from arc_ds.system.checksums import FileEntry, hash_file
from arc_ds.system.files import sync_file, write_whole

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
    sync_file(path)
    return FileEntry(path=path.relative_to(folder).as_posix(), size=path.stat().st_size, xxh128=hash_file(path))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` durably. Call it last: a folder without a manifest is not a checkpoint."""
    content = {"version": MANIFEST_VERSION, **asdict(manifest)}
    write_whole(folder / MANIFEST_NAME, json.dumps({**content, "digest": _digest(content)}, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`. Raises CheckpointError if it is missing, truncated, altered or of an unknown version."""
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a whole checkpoint: it has no {MANIFEST_NAME}.") from None
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): the checkpoint is damaged.") from error
    if not isinstance(content, dict) or content.pop("digest", None) != _digest(content):
        raise CheckpointError(f"{path} does not match its own digest: the checkpoint is damaged.")
    if content["version"] != MANIFEST_VERSION:
        raise CheckpointError(
            f"{path} has version {content['version']}, but this program reads version {MANIFEST_VERSION}. "
            "Resume with the release that wrote it."
        )
    files = tuple(FileEntry(**entry) for entry in content["files"])
    return Manifest(step=content["step"], world_size=content["world_size"], files=files)


def _digest(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()

"""`checksums.json` of an export: size and checksum of each of its files.

Loading compares the sizes of the weight files, which costs nothing. `verify_export` reads every file. The model card is
not listed, because people edit it. Exports of earlier versions have no such file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from arc_ds.errors import WeightsError
from arc_ds.model.weights.fields import Fields
from arc_ds.system.checksums import FileEntry, find_faults
from arc_ds.system.files import file_size

CHECKSUMS = "checksums.json"
_VERSION = 1
_REMEDY = "Copy the export again from its source, or export the checkpoint again."


def write_checksums(folder: Path, files: Sequence[FileEntry]) -> None:
    """Write the file to a folder that is not published yet."""
    content = {"version": _VERSION, "files": [asdict(entry) for entry in files]}
    (folder / CHECKSUMS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_checksums(folder: Path) -> tuple[FileEntry, ...]:
    """The recorded files; empty if there is no record. Raises WeightsError if the record is damaged."""
    path = folder / CHECKSUMS
    if not path.is_file():
        return ()
    fields = Fields.read(path)
    try:
        return tuple(FileEntry(**entry) for entry in fields.values["files"])
    except (KeyError, TypeError) as error:
        raise WeightsError(f"{path} does not list files with path, size and xxh128: {error}. {_REMEDY}") from error


def check_sizes(folder: Path) -> None:
    """Raise WeightsError if a weight file of an export has another size than recorded. Missing ones are left out."""
    for entry in read_checksums(folder):
        path = folder / entry.path
        size = file_size(path)
        if path.suffix == ".safetensors" and size not in (None, entry.size):
            raise WeightsError(
                f"{path} has {size} bytes, but {CHECKSUMS} says {entry.size}: it is damaged or of another export. "
                f"{_REMEDY}"
            )


def verify_export(folder: Path) -> tuple[FileEntry, ...]:
    """Compare every file of an export with its checksum. Returns the files.

    Raises WeightsError that lists the faults, or if the export has no record of its files.
    """
    files = read_checksums(folder)
    if not files:
        raise WeightsError(
            f"{folder} has no {CHECKSUMS}: it is no export, or one of an earlier version, which cannot be verified. "
            "Export the checkpoint again."
        )
    if faults := find_faults(folder, files):
        raise WeightsError(f"{folder} is damaged: {'; '.join(faults)}. {_REMEDY}")
    return files

"""The inputs of a build: finds the files and reads them in batches that do not depend on the number of workers."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from arc_ds.errors import DataError
from arc_ds.shards.building.batches import Batch, Compression, Cursor, InputFile, InputKind
from arc_ds.shards.building.inputs_lines import read_line_batches, read_text_batch, why_no_lines
from arc_ds.shards.building.inputs_rows import read_row_batches
from arc_ds.shards.format import FORMAT, MANIFEST
from arc_ds.system.user_files import check_downloaded, read_user_json

logger = logging.getLogger(__name__)

_MAX_NAMED = 20  # entries that are logged by name
_KINDS: dict[str, InputKind] = {".txt": "text", ".json": "jsonl", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_COMPRESSIONS: dict[str, Compression] = {"": "", ".gz": "gz", ".zst": "zst", ".zstd": "zst"}
# Lower-case file name suffix -> kind and compression.
_ENDINGS: dict[str, tuple[InputKind, Compression]] = {
    first + second: (kind, compression)
    for first, kind in _KINDS.items()
    for second, compression in _COMPRESSIONS.items()
}
_ENDINGS |= {".parquet": ("parquet", ""), ".arrow": ("arrow", ""), ".feather": ("arrow", "")}
_EXPECTED = f"{', '.join(_KINDS)} (also {', '.join(filter(None, _COMPRESSIONS))}), .parquet or .arrow"
# Files of the library `datasets`.
_STATE = "state.json"
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
_INDEX_FILES = ("_indices_files", "_indices_data_files")
_JSON_ENDINGS = tuple(f".json{compression}" for compression in _COMPRESSIONS)


class Inputs(NamedTuple):
    """The input files, and the entries of input folders that are skipped.

    passed_over: files of other kinds, .json files that are not JSON lines, hidden entries (the name begins with a dot),
        broken links, links to an enclosing folder, folders of shards, folders that cannot be searched, and files that
        the library `datasets` leaves next to its data.
    """

    files: tuple[InputFile, ...]
    passed_over: tuple[Path, ...]


def find_inputs(inputs: Sequence[str | Path], *, without: Path | None = None) -> Inputs:
    """Expand folders to the input files in them and in their subfolders, in sorted order. Links are followed.

    Logs the entries that are passed over.

    inputs: files and folders.
    without: a folder to skip if it lies inside an input folder.

    Raises DataError if an input is missing or of an unknown kind, a .json file is not JSON lines, a file is given
    twice, or a folder cannot be searched or contains no input file.
    """
    files: list[InputFile] = []
    passed_over: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = _search(path, without)
            files += found.files
            passed_over += found.passed_over
        elif (file := input_file(path)) is not None:
            files.append(file)
            if (fault := _why_no_lines(file)) is not None:
                raise DataError(fault)
        else:
            state = "of another kind" if path.exists() else "missing"
            raise DataError(f"input {path} is {state}; expected a folder, or a file ending in {_EXPECTED}.")
    if not files:
        raise DataError("no inputs were given. Pass text, JSONL or Parquet files, or folders of them.")
    seen: dict[Path, Path] = {}
    for file in files:
        first = seen.setdefault(file.path.resolve(), file.path)
        if first is not file.path:
            again = "is named twice" if first == file.path else f"is the same file as {first}"
            raise DataError(
                f"input {file.path} {again}, so the shards would contain its documents twice. Pass it once."
            )
    if passed_over:
        names = ", ".join(map(str, passed_over[:_MAX_NAMED])) + (", …" if len(passed_over) > _MAX_NAMED else "")
        logger.warning(
            "skipped %d files or folders that are not inputs: %s. To use one of them, pass its path.",
            *(len(passed_over), names),
        )
    return Inputs(tuple(files), tuple(passed_over))


def _search(folder: Path, without: Path | None) -> Inputs:
    """The inputs in a folder. Raises DataError if there are none or the folder cannot be searched."""
    try:
        held = sorted(_below(folder, frozenset() if without is None else frozenset((without.resolve(),))))
    except OSError as error:
        raise DataError(f"{folder}: cannot be searched ({error}). Make it readable, or pass its files.") from error
    left_by_datasets = {path for parent in {path.parent for path in held} for path in _left_by_datasets(parent)}
    named = [path for path in held if not path.name.startswith(".") and path not in left_by_datasets]
    found = [file for path in named if (file := input_file(path, str(path.relative_to(folder)))) is not None]
    faults = {file.path: fault for file in found if (fault := _why_no_lines(file)) is not None}
    files = [file for file in found if file.path not in faults]
    if not files:
        names = sorted(path.name for path in left_by_datasets.intersection(held) if path.suffix == ".arrow")
        found_instead = f"only {', '.join(names)} of `datasets`. To use one, pass its path" if names else "none"
        nothing = f"{folder}: expected files ending in {_EXPECTED}, found {found_instead}. Check the path."
        raise DataError(next(iter(faults.values()), nothing))
    others = set(held).difference(file.path for file in files)
    return Inputs(tuple(files), tuple(sorted(others)))


def _below(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    """Yield the entries of a folder and its subfolders, without descending into subfolders that are skipped.

    Skipped are hidden folders (such as unfinished builds and notebook checkpoints), folders of shards, folders that
    cannot be searched, and folders in `above`.

    above: the enclosing folders. Skipping them ends the recursion on links that form a cycle.

    Raises OSError if the folder cannot be searched.
    """
    above |= {folder.resolve()}
    for path in folder.iterdir():
        is_skipped = path.name.startswith(".") or path.resolve() in above or _is_shards(path)
        if path.is_dir() and not is_skipped and os.access(path, os.R_OK | os.X_OK):
            yield from _below(path, above)
        else:
            yield path


def _is_shards(folder: Path) -> bool:
    """Whether a folder is a set of shards. Its manifest and token caches are not documents."""
    try:
        with (folder / MANIFEST).open("rb") as file:
            return FORMAT.encode() in file.read(4096)
    except OSError:
        return False


def _left_by_datasets(folder: Path) -> Iterator[Path]:
    """Yield the files that the library `datasets` leaves next to its data: descriptions, and rows of earlier calls.

    `state.json` lists the data files that `save_to_disk` wrote. Without it, names tell the files of `map` and `filter`.

    Raises DataError if a listed file is missing, or if the data have rows that an index of the library leaves out.
    """
    yield from (folder / name for name in _DESCRIPTIONS)
    state: Any = None
    if (folder / _STATE).is_file() and next(folder.glob("*.arrow"), None):
        state = read_user_json(folder / _STATE, DataError, remedy="Save the data set again.")
    if not isinstance(state, dict) or "_data_files" not in state:
        yield from folder.glob("cache-*.arrow")
        return
    yield folder / _STATE
    listed = {folder / entry["filename"] for entry in state["_data_files"] if "filename" in entry}
    if missing := sorted(path.name for path in listed if not path.is_file()):
        raise DataError(
            f"{folder}: expected the files that its {_STATE} lists, found no {', '.join(missing)}. "
            "Copy the folder again."
        )
    if any(state.get(name) for name in _INDEX_FILES):
        raise DataError(
            f"{folder}: an index selects some of its rows, and the build would read all. Save it without the index, in "
            "Python: datasets.load_from_disk(FOLDER).flatten_indices().save_to_disk(NEW)"
        )
    yield from (path for path in folder.glob("*.arrow") if path not in listed)


def _why_no_lines(file: InputFile) -> str | None:
    """Like `inputs_lines.why_no_lines`, but only for .json files, because only these may hold other JSON than lines."""
    if not file.name.lower().endswith(_JSON_ENDINGS):
        return None
    return why_no_lines(file)


def input_file(path: Path, name: str | None = None) -> InputFile | None:
    """The input file at a path; None if its ending is unknown. Raises DataError if it was not downloaded (Git LFS)."""
    ending = next((ending for ending in _ENDINGS if path.name.lower().endswith(ending)), None)
    if ending is None or not path.is_file():
        return None
    check_downloaded(path, DataError)
    kind, compression = _ENDINGS[ending]
    status = path.stat()
    return InputFile(
        path=path,
        name=name or path.name,
        kind=kind,
        compression=compression,
        num_bytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
    )


def read_batches(
    file: InputFile, *, columns: Sequence[str], max_document_bytes: int, start: Cursor | None = None
) -> Iterator[Batch]:
    """Read the documents of a file in batches. Memory use does not grow with the file size.

    columns: columns to read from a Parquet or Arrow file. Columns that the file lacks are ignored.
    max_document_bytes: longer documents are not kept in memory.
    start: the first batch to read; None: the beginning of the file.

    Raises DataError if the file cannot be read: it is missing, truncated or damaged, or its library is not installed.
    """
    start = start or Cursor()
    if file.kind in ("parquet", "arrow"):
        return read_row_batches(file, columns, start)
    if file.kind == "text":
        return read_text_batch(file, max_document_bytes)
    return read_line_batches(file, max_document_bytes, start)

"""Sets of vectors: compressed texts in shards of safetensors, with an index. Texts are added, and never changed.

FOLDER/vectors.json                the model and its settings
FOLDER/vectors-00000.safetensors   one tensor, `vectors` [rows, D]
FOLDER/vectors-00000.jsonl         its index, one line for each text: {"id", "first_row", "rows", "tokens",
                                   "digest"}

The index of a shard is written before its tensor. So a shard is whole if its tensor exists, whenever the writer was
killed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from arc_ds.batch.segments import Marker
from arc_ds.errors import DataError
from arc_ds.inference.arc import ArcModel
from arc_ds.model.weights.lazy_tensor import value_bytes
from arc_ds.system.files import output, write_whole
from arc_ds.system.user_files import parse_user_json, read_user_json, read_user_text

FORMAT = "arc-ds-vectors"
SETTINGS = "vectors.json"
SHARD_BYTES = 256 << 20
_TENSOR = "vectors"
_REMEDY = "Copy the folder again from its source, or compress the texts again into another folder."


@dataclass(frozen=True, kw_only=True)
class VectorSettings:
    """The origin of the vectors of a set.

    model: digest of the compressor (`model_digest`).
    decoder: index of the port.
    marker: marker at the end of each text's vectors, or None.
    hidden_size: width of the vectors.
    """

    model: str
    decoder: int
    marker: Marker | None
    hidden_size: int


class VectorEntry(NamedTuple):
    """The vectors of one text: the rows of a shard, and number of tokens and `text_digest` of the text."""

    shard: Path
    first_row: int
    rows: int
    tokens: int
    digest: str


def model_digest(model: ArcModel) -> str:
    """sha256 of the compressor: its spec, and dtype and values of its parameters."""
    digest = hashlib.sha256(json.dumps(model.spec.to_json(), sort_keys=True).encode())
    for name, parameter in model.compressor.named_parameters():
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)} ".encode())
        digest.update(value_bytes(parameter.detach().cpu()))
    return digest.hexdigest()


def text_digest(text: str) -> str:
    """Digest of a text. An edited text has another one."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class VectorSet(Mapping[str, Tensor]):
    """A set of vectors on disk: id → vectors [rows, D] on the CPU. Tensors are read at access; the index is in memory.

    Raises DataError if the folder is no set, or a shard is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.settings = _read_settings(self.folder)
        self.entries = {key: entry for shard in _shards(self.folder) for key, entry in _read_index(shard)}
        self._opened: dict[Path, Any] = {}

    def __getitem__(self, key: str) -> Tensor:
        shard, first_row, rows, *_ = self.entries[key]
        if shard not in self._opened:
            self._opened[shard] = _open(shard)
        tensor: Tensor = self._opened[shard][first_row : first_row + rows]
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def read_vectors(folder: str | Path) -> VectorSet:
    """Open a set that `arc-ds compress` wrote."""
    return VectorSet(folder)


class VectorWriter:
    """Adds texts to a set. A new set needs an empty or missing folder.

    folder: of the set. Only one process may write there (`system.locks.writing`).
    settings: of the new vectors.
    shard_bytes: size of a shard. Vectors are kept in memory until there are so many.

    Raises DataError if the folder holds something else, or vectors of other settings.
    """

    def __init__(self, folder: Path, settings: VectorSettings, *, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self._waiting: list[tuple[str, Tensor, int, str]] = []
        self._num_bytes = 0
        for left in folder.glob(".vectors*.partial-*"):
            left.unlink()  # of a killed process
        if (folder / SETTINGS).is_file():
            _check_same(folder, _read_settings(folder), settings)
        else:
            _check_empty(folder)
            with output(folder):
                content = {"format": FORMAT, "version": 1, **asdict(settings)}
                write_whole(folder / SETTINGS, json.dumps(content, indent=2) + "\n")
        shards = _shards(folder)
        self.num_shards = len(shards)
        self.earlier = {key: entry.digest for shard in shards for key, entry in _read_index(shard)}

    def add(self, key: str, vectors: Tensor, tokens: int, digest: str) -> None:
        """Add the vectors [rows, D] of one text. A shard is written when there are enough.

        key: id of the text. It must be new.
        tokens: number of its tokens.
        digest: its `text_digest`.
        """
        self._waiting.append((key, vectors, tokens, digest))
        self._num_bytes += vectors.nbytes
        if self._num_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the texts that are in memory as one shard."""
        if not self._waiting:
            return
        lines, first_row = [], 0
        for key, vectors, tokens, digest in self._waiting:
            line = {"id": key, "first_row": first_row, "rows": len(vectors), "tokens": tokens, "digest": digest}
            lines.append(json.dumps(line) + "\n")
            first_row += len(vectors)
        shard = _shard_file(self.folder, self.num_shards)
        with output(self.folder, after=lambda: "The same command continues after its whole shards."):
            write_whole(_index_file(shard), "".join(lines))
            write_whole(shard, save({_TENSOR: torch.cat([vectors for _, vectors, _, _ in self._waiting])}))
        self.num_shards += 1
        self._waiting, self._num_bytes = [], 0


def _shard_file(folder: Path, number: int) -> Path:
    return folder / f"vectors-{number:05d}.safetensors"


def _index_file(shard: Path) -> Path:
    return shard.with_suffix(".jsonl")


def _shards(folder: Path) -> list[Path]:
    shards = sorted(folder.glob("vectors-*.safetensors"))
    expected = [_shard_file(folder, number) for number in range(len(shards))]
    if shards != expected:
        missing = next(path for path in expected if path not in shards)
        raise DataError(f"{missing} is missing, but later shards exist. {_REMEDY}")
    return shards


def _read_index(shard: Path) -> Iterator[tuple[str, VectorEntry]]:
    path = _index_file(shard)
    for number, line in enumerate(read_user_text(path, DataError, remedy=_REMEDY).splitlines(), 1):
        entry = parse_user_json(line, f"{path}, line {number}", DataError, remedy=_REMEDY)
        try:
            yield (
                entry["id"],
                VectorEntry(shard, *(entry[name] for name in ("first_row", "rows", "tokens", "digest"))),
            )
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number} is no entry of an index: {line[:80]}. {_REMEDY}") from error


def _open(shard: Path) -> Any:
    try:
        return safe_open(shard, framework="pt").get_slice(_TENSOR)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{shard} is damaged: {error}. {_REMEDY}") from error


def _read_settings(folder: Path) -> VectorSettings:
    path = folder / SETTINGS
    content = read_user_json(path, DataError, remedy="Give a folder that `arc-ds compress --out FOLDER` wrote.")
    try:
        if content["format"] == FORMAT and content["version"] == 1:
            return VectorSettings(**{name: content[name] for name in VectorSettings.__dataclass_fields__})
    except (KeyError, TypeError):
        pass
    raise DataError(f"{path} does not describe a set of vectors of version 1. {_REMEDY}")


def _check_same(folder: Path, earlier: VectorSettings, settings: VectorSettings) -> None:
    mine, other = asdict(settings), asdict(earlier)
    different = [f"{name} {other[name]!r} there, {mine[name]!r} here" for name in mine if mine[name] != other[name]]
    if different:
        raise DataError(
            f"{folder} holds vectors of another model or of other options: {'; '.join(different)}. Use the model and "
            "the options of the first run, or give another folder."
        )


def _check_empty(folder: Path) -> None:
    others = sorted(path.name for path in folder.iterdir() if path.name != "lock")
    if others:
        raise DataError(
            f"{folder} is not empty and is no set of vectors (it holds {others[0]}). Give a new or an empty folder."
        )

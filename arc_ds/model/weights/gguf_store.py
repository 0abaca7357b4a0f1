"""The files of a GGUF model as tensors and metadata. The `gguf` package dequantises one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from arc_ds.errors import WeightsError
from arc_ds.model.weights.names import Shape
from arc_ds.model.weights.stores import ALL_ROWS
from arc_ds.system.user_files import check_downloaded
from arc_ds.tokenizers.gguf_header import GgufHeader, GgufTensor, read_gguf_header

# numpy's and torch's dtype of the formats without blocks. numpy has no bfloat16.
_PLAIN: Mapping[int, tuple[Any, torch.dtype]] = MappingProxyType(
    {0: (np.float32, torch.float32), 1: (np.float16, torch.float16), 30: (np.int16, torch.bfloat16)}
)


class _Place(NamedTuple):
    """The place of a tensor in the files.

    path: its file.
    start: its first byte.
    entry: its entry in the header.
    """

    path: Path
    start: int
    entry: GgufTensor


class GgufStore:
    """The metadata and tensors of one GGUF model.

    files: its files in order (`gguf_parts`).

    `metadata` comes from the first file, without the tokenizer's lists. `tensor` returns float32, or the dtype of the
    file if it stores plain float16 or bfloat16.

    Raises WeightsError if a file is not GGUF, is truncated, has an unsupported version or block format, or is another
    part of a model than its name says.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.path = files[0]
        headers = [_read_header(path) for path in files]
        _check_parts(files, headers)
        self.metadata: Mapping[str, Any] = headers[0].metadata
        self._places = {
            name: _Place(path, header.data_start + entry.offset, entry)
            for path, header in zip(files, headers, strict=True)
            for name, entry in header.tensors.items()
        }
        self.shapes: Mapping[str, Shape] = {name: place.entry.shape for name, place in self._places.items()}
        self._quants = _quants(self.path)
        self._check_kinds()
        self._check_sizes()

    @property
    def formats(self) -> Mapping[str, str]:
        """Number format of every tensor."""
        kind_of = self._quants.GGMLQuantizationType
        return {name: kind_of(place.entry.kind).name for name, place in self._places.items()}

    def tensor(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        path, start, entry = self._places[name]
        if entry.kind in _PLAIN:
            stored, dtype = _PLAIN[entry.kind]
            plain = np.memmap(path, stored, "r", offset=start, shape=entry.shape)
            return torch.from_numpy(np.array(plain[rows])).view(dtype)
        block = np.memmap(path, np.uint8, "r", offset=start, shape=self._stored_shape(entry))
        kind = self._quants.GGMLQuantizationType(entry.kind)
        return torch.from_numpy(np.ascontiguousarray(self._quants.dequantize(block[rows], kind), dtype=np.float32))

    def _stored_shape(self, entry: GgufTensor) -> Shape:
        """Shape in bytes of a quantised tensor. Each row consists of whole blocks."""
        kind = self._quants.GGMLQuantizationType(entry.kind)
        block_size, block_bytes = self._quants.GGML_QUANT_SIZES[kind]
        return (*entry.shape[:-1], entry.shape[-1] // block_size * block_bytes)

    def _check_kinds(self) -> None:
        for kind, name in {place.entry.kind: name for name, place in self._places.items()}.items():
            try:
                known = self._quants.GGMLQuantizationType(kind)
                block_bytes = self._quants.GGML_QUANT_SIZES[known][1]
                self._quants.dequantize(np.zeros((1, block_bytes), np.uint8), known)
            except (ValueError, NotImplementedError) as error:
                raise WeightsError(
                    f"{self.path}: tensor `{name}` has the block format {kind}, which this version of the gguf "
                    "package cannot read. Update gguf, or use a file with another quantisation."
                ) from error

    def _check_sizes(self) -> None:
        sizes = {path: path.stat().st_size for path in {place.path for place in self._places.values()}}
        for name, (path, start, entry) in self._places.items():
            end = start + math.prod(self._stored_shape(entry))
            if end > sizes[path]:
                raise WeightsError(
                    f"{path} is cut short: tensor `{name}` ends at byte {end}, the file at {sizes[path]}. Copy it "
                    "again."
                )


def _read_header(path: Path) -> GgufHeader:
    check_downloaded(path, WeightsError)
    try:
        return read_gguf_header(path)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} is not a complete GGUF file: {error}. Copy it again.") from error


def _check_parts(files: Sequence[Path], headers: Sequence[GgufHeader]) -> None:
    """Raise WeightsError if a file is not the part of a split model that its name says."""
    for idx, (path, header) in enumerate(zip(files, headers, strict=True)):
        number, count = header.metadata.get("split.no", 0), header.metadata.get("split.count", 0)
        if (number, max(count, 1)) != (idx, len(files)):
            raise WeightsError(
                f"{path} is part {number + 1} of {count}; expected part {idx + 1} of {len(files)}, as its name says. "
                f"Restore the name that ends in -{number + 1:05d}-of-{count:05d}.gguf, or copy the files again."
            )
    expected, found = headers[0].metadata.get("split.tensors.count"), sum(len(header.tensors) for header in headers)
    if expected not in (None, found):
        raise WeightsError(
            f"{files[0]}: the {len(files)} files of this model hold {found} tensors, expected {expected}. They belong "
            "to different models: copy them again from one source."
        )


def _quants(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise WeightsError(f"{path} needs the gguf package. Run: pip install 'arc-ds[backbones]'") from error
    return gguf

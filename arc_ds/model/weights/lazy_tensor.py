"""Tensors that are read in blocks, and a safetensors writer that never holds a whole tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import xxhash
from torch import Tensor

from arc_ds.model.weights.names import Shape

if TYPE_CHECKING:
    from arc_ds.model.weights.load import TensorSource

_BLOCK_VALUES = 1 << 20
# Names in safetensors, in the order in which its own writer places tensors.
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT = 8


@dataclass(frozen=True, kw_only=True)
class LazyTensor:
    """A tensor whose values are read in blocks.

    shape: its shape.
    dtype: dtype of the values that `read` returns.
    read: reads the flat values from a first to a last index (exclusive) to the CPU.
    unit: `read` takes multiples of this number of values.
    """

    shape: Shape
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]
    unit: int = 1

    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def blocks(self) -> Iterator[Tensor]:
        """All values, flat, in blocks of about 1 M."""
        numel, step = self.numel(), max(_BLOCK_VALUES // self.unit, 1) * self.unit
        for start in range(0, numel, step):
            yield self.read(start, min(start + step, numel))

    def map(self, change: Callable[[Tensor], Tensor], *, dtype: torch.dtype | None = None, unit: int = 1) -> LazyTensor:
        """This tensor with a change of each block of flat values.

        change: maps flat values of a whole number of units to as many flat values.
        dtype: dtype after the change; None keeps it.
        unit: number of values that the change needs together.
        """
        return replace(
            self,
            dtype=dtype or self.dtype,
            unit=math.lcm(self.unit, unit),
            read=lambda start, stop: change(self.read(start, stop)),
        )

    def to(self, dtype: torch.dtype) -> LazyTensor:
        """This tensor in another dtype."""
        return self.map(lambda values: values.to(dtype), dtype=dtype)

    def whole(self) -> Tensor:
        """Read the whole tensor."""
        return torch.cat([*self.blocks(), torch.empty(0, dtype=self.dtype)]).reshape(self.shape)


def as_lazy(tensor: Tensor | LazyTensor) -> LazyTensor:
    """A tensor in memory as a lazy one."""
    if isinstance(tensor, LazyTensor):
        return tensor
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return LazyTensor(shape=tuple(tensor.shape), dtype=tensor.dtype, read=lambda start, stop: flat[start:stop])


def lazy_rows(source: TensorSource, name: str, dtype: torch.dtype) -> LazyTensor:
    """A tensor of files, read in whole rows and converted to `dtype`."""
    shape = source.shapes[name]
    width = math.prod(shape[1:])

    def read(start: int, stop: int) -> Tensor:
        return source.tensor(name, slice(start // width, stop // width)).reshape(-1).to(dtype)

    return LazyTensor(shape=shape, dtype=dtype, read=read, unit=width)


def value_bytes(values: Tensor) -> memoryview:
    """The bytes of a tensor's values, without a copy if it is contiguous on the CPU."""
    return values.contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write tensors to a safetensors file, block by block. Returns xxh128 of the file's content in hex.

    The file has the same bytes as the one of `safetensors.torch.save_file` for the same tensors.

    metadata: texts for the header's `__metadata__`.
    """
    order = list(_DTYPES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name.encode()))
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end = start + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    digest = xxhash.xxh3_128()
    with path.open("wb") as file:
        for part in (len(encoded).to_bytes(8, "little"), encoded):
            file.write(part)
            digest.update(part)
        for name in names:
            for block in tensors[name].blocks():
                values = value_bytes(block)
                file.write(values)
                digest.update(values)
    return digest.hexdigest()

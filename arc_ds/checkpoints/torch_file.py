"""The places of tensors in a file of `torch.save`, found without running its pickle.

A pickle can name any function of any module and call it. The unpickler here resolves only the names that rebuild
tensors and containers. Every other name becomes an inert object, so no code runs and DeepSpeed need not be installed.
Values are read with plain reads: mapped pages would count as memory of the process.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arc_ds.errors import CheckpointError, words_of
from arc_ds.model.weights.names import Shape

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LOCAL_HEADER_BYTES = 30  # of a zip member, before its name and its extra field


class StoredTensor(NamedTuple):
    """A contiguous tensor in a file.

    path: the file.
    offset: first byte of its values.
    dtype: dtype of its values.
    shape: its shape.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: Shape

    def read(self, start: int, stop: int) -> Tensor:
        """Read the flat values `start` to `stop`. Raises CheckpointError if the file has become shorter."""
        values = torch.empty(stop - start, dtype=self.dtype)
        rest = values.view(torch.uint8).numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start * self.dtype.itemsize)
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise CheckpointError(f"{self.path} has become shorter while it was read. Start again.")
                rest = rest[count:]
        return values


def read_torch_file(path: Path) -> Any:
    """The content of a file of `torch.save`, with a `StoredTensor` in place of each tensor.

    Objects of other classes than containers and tensors are replaced by inert ones. Raises CheckpointError if the file
    is damaged, or holds a tensor that is not contiguous.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            root = pickled.removesuffix("data.pkl")
            if archive.read(f"{root}byteorder") != b"little":
                raise CheckpointError(f"{path} was written by a big-endian machine. Export it on such a machine.")

            def offset_of(key: str) -> int:
                member = archive.getinfo(f"{root}data/{key}")
                file.seek(member.header_offset + _LOCAL_HEADER_BYTES - 4)
                lengths = file.read(4)
                names = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
                return member.header_offset + _LOCAL_HEADER_BYTES + names

            with archive.open(pickled) as stream:
                return _Unpickler(stream, path, offset_of).load()
    except (zipfile.BadZipFile, pickle.UnpicklingError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a file of torch.save: {words_of(error)}. Export another checkpoint of the run."
        ) from error


class _Storage(NamedTuple):
    dtype: torch.dtype
    offset: int


class _Inert:
    """Stands for an object of an unknown class: takes any arguments, items and state, and ignores them."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, __: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: Any, path: Path, offset_of: Any) -> None:
        super().__init__(stream)
        self._path = path
        self._offset_of = offset_of

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch._tensor", "_rebuild_from_type_v2"): lambda rebuild, _, arguments, __: rebuild(*arguments),
        }
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        return known.get((module, name), _Inert)

    def persistent_load(self, reference: Any) -> _Storage:
        _, dtype, key, *_ = reference
        return _Storage(dtype, self._offset_of(key))

    def _tensor(self, storage: _Storage, first: int, shape: Shape, stride: Shape, *_: Any) -> StoredTensor:
        expected = 1
        for size, step in zip(reversed(shape), reversed(stride), strict=True):
            if size > 1 and step != expected:
                raise CheckpointError(f"{self._path} holds a tensor of strides {list(stride)}, expected none.")
            expected *= size
        return StoredTensor(self._path, storage.offset + first * storage.dtype.itemsize, storage.dtype, tuple(shape))

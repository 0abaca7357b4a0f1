"""The places of tensors in a file of `torch.save`, found without running its pickle.

A pickle can name any function of any module and call it. The unpickler here resolves only the names that rebuild
tensors and containers. Every other name becomes an inert object, so no code runs and DeepSpeed need not be installed.
It extends the unpickler written in Python: the one in C allocates memory for counts that a file merely claims.
Values are read with plain reads: mapped pages would count as memory of the process.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
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
    is damaged, or holds a tensor that is not contiguous or lies outside its storage.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("it is compressed")
            (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            root = pickled.removesuffix("data.pkl")
            if archive.read(f"{root}byteorder") != b"little":
                raise CheckpointError(f"{path} was written by a big-endian machine. Read it on such a machine.")

            def open_storage(key: str) -> tuple[int, int]:
                """First byte and size of a storage."""
                member = archive.getinfo(f"{root}data/{key}")
                file.seek(member.header_offset + _LOCAL_HEADER_BYTES - 4)
                lengths = file.read(4)
                names = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
                return member.header_offset + _LOCAL_HEADER_BYTES + names, member.file_size

            with archive.open(pickled) as stream:
                return _Unpickler(stream, path, open_storage).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can make any call fail in any way
        raise CheckpointError(
            f"{path} cannot be read as a file of torch.save: {words_of(error)}. Use another checkpoint of the run."
        ) from error


class _Storage(NamedTuple):
    dtype: torch.dtype
    offset: int
    num_bytes: int


class _Inert:
    """Stands for an object of an unknown class: takes any arguments, items and state, and ignores them."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, __: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...


class _Unpickler(pickle._Unpickler):
    def __init__(self, stream: Any, path: Path, open_storage: Callable[[str], tuple[int, int]]) -> None:
        super().__init__(stream)
        self._path = path
        self._open_storage = open_storage

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
        return _Storage(dtype, *self._open_storage(key))

    def _tensor(self, storage: _Storage, first: int, shape: Shape, stride: Shape, *_: Any) -> StoredTensor:
        expected = 1
        for size, step in zip(reversed(shape), reversed(stride), strict=True):
            if size > 1 and step != expected:
                raise CheckpointError(f"{self._path} holds a tensor of strides {list(stride)}, expected none.")
            expected *= size
        itemsize = storage.dtype.itemsize
        are_counts = all(isinstance(count, int) and count >= 0 for count in (first, *shape))
        if not are_counts or (first + expected) * itemsize > storage.num_bytes:
            raise ValueError(f"a tensor of shape {list(shape)} lies outside its storage of {storage.num_bytes} bytes")
        return StoredTensor(self._path, storage.offset + first * itemsize, storage.dtype, tuple(shape))

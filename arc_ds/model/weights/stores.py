"""Tensor files. Names and shapes are available immediately; tensors, or some of their rows, are read one at a time."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from arc_ds.errors import WeightsError, words_of
from arc_ds.model.weights.names import Shape, join_faults
from arc_ds.system.user_files import check_downloaded

ALL_ROWS = slice(None)
# safetensors' names by torch's. Numbers of other dtypes mean something only with the scales of a quantisation.
_SHORT = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
_PLAIN = frozenset(_SHORT.values())
_ONE_MODEL = "Copy all consolidated files of one model again from one source."


class TensorStore(Protocol):
    """Named tensors in files. Only `tensor` touches the data."""

    @property
    def path(self) -> Path:
        """The file, or the first one of several."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor, from the headers."""

    @property
    def formats(self) -> Mapping[str, str]:
        """Number format of every tensor: BF16, Q4_K, ..."""

    def tensor(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        """Read a tensor, or a slice of its dimension 0, to the CPU in the file's dtype."""


class SafetensorsStore:
    """One safetensors file of plain floats.

    Raises WeightsError if it is damaged or truncated (the header gives the expected size), or holds another dtype.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_downloaded(path, WeightsError)
        try:
            self._file: Any = safe_open(path, framework="pt")
            names = self._file.keys()
            entries = {name: self._file.get_slice(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{path} is not a complete safetensors file: {error}. It was cut short or damaged; copy it again."
            ) from error
        self.shapes: Mapping[str, Shape] = {name: tuple(entry.get_shape()) for name, entry in entries.items()}
        self.formats: Mapping[str, str] = {name: entry.get_dtype() for name, entry in entries.items()}
        _check_plain(path, self.formats)

    def tensor(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        if rows == ALL_ROWS:
            return self._file.get_tensor(name)
        return self._file.get_slice(name)[rows]


class PickleStore:
    """One .pth file, memory-mapped and restricted to tensors of plain floats by name (`weights_only`).

    Raises WeightsError if it is damaged, too old to be mapped, or contains anything else: a pickle can run code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_downloaded(path, WeightsError)
        try:
            loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            raise WeightsError(
                f"{path} holds more than tensors. It is not opened, because a pickle can run code "
                f"({words_of(error)}). Get the weights as safetensors."
            ) from error
        except Exception as error:  # a damaged pickle raises KeyError, IndexError, TypeError, AssertionError, ...
            raise WeightsError(
                f"{path} cannot be mapped as a PyTorch checkpoint: {words_of(error)}. Copy it again; a file from "
                "before PyTorch 1.6 must be saved again."
            ) from error
        if not isinstance(loaded, dict):
            raise WeightsError(f"{path}: expected a dict of tensors, got {type(loaded).__name__}")
        others = [f"`{n}` is a {type(entry).__name__}" for n, entry in loaded.items() if not isinstance(entry, Tensor)]
        if others:
            raise WeightsError(
                f"{path}: expected tensors only; {join_faults(others)}. Save the model's tensors alone, by name: "
                "torch.save(model.state_dict(), FILE)."
            )
        self._tensors: Mapping[str, Tensor] = loaded
        self.shapes: Mapping[str, Shape] = {n: tuple(t.shape) for n, t in loaded.items()}
        self.formats: Mapping[str, str] = {n: _SHORT.get(str(t.dtype), str(t.dtype)) for n, t in loaded.items()}
        _check_plain(path, self.formats)

    def tensor(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        return self._tensors[name][rows]


class JoinedStore:
    """Several files, read as one. A tensor in several of them is a copy.

    Raises WeightsError if copies differ. At first it compares their shapes and their first rows. `tensor` compares the
    rows that it reads.
    """

    def __init__(self, files: Sequence[TensorStore]) -> None:
        self.path = files[0].path
        self._copies: dict[str, list[TensorStore]] = {}
        for file in files:
            for name in file.shapes:
                self._copies.setdefault(name, []).append(file)
        self.shapes: Mapping[str, Shape] = {name: copies[0].shapes[name] for name, copies in self._copies.items()}
        self.formats: Mapping[str, str] = {name: copies[0].formats[name] for name, copies in self._copies.items()}
        for name, copies in self._copies.items():
            if len(copies) > 1:
                self.tensor(name, _first_row(self.shapes[name]))

    def tensor(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        return _equal_values(
            self._copies[name], name, rows, "one of them belongs to other weights. Move that file out of the folder."
        )


class ModelParallelStore:
    """Meta's model-parallel files, read as one. Each file holds a part of every tensor.

    axis_of: the axis along which the parts of a tensor are concatenated, from its name and the shape of a part; None
        for a vector, of which each file holds the same values.

    Raises WeightsError if a file lacks a tensor, if parts differ along another axis, or if the values of a vector
    differ. At first it compares the first values of vectors. `tensor` compares all values.
    """

    def __init__(self, files: Sequence[TensorStore], axis_of: Callable[[str, Shape], int | None]) -> None:
        self.path = files[0].path
        self._files = files
        names = dict.fromkeys(name for file in files for name in file.shapes)
        lacking = [f"{file.path.name} lacks `{name}`" for file in files for name in names if name not in file.shapes]
        self._check(lacking)
        self._axes = {name: axis_of(name, files[0].shapes[name]) for name in names}
        self._check([fault for name in names if (fault := self._fault(name))])
        self.shapes: Mapping[str, Shape] = {name: self._joined_shape(name) for name in names}
        self.formats = files[0].formats
        for name, axis in self._axes.items():
            if axis is None:
                self.tensor(name, _first_row(self.shapes[name]))

    def tensor(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        axis = self._axes[name]
        if axis is None:
            return _equal_values(self._files, name, rows, f"they belong to different models. {_ONE_MODEL}")
        if axis > 0:
            return torch.cat([file.tensor(name, rows) for file in self._files], dim=axis)
        first, last, _ = rows.indices(self.shapes[name][0])
        parts, end = [], 0
        for file in self._files:
            start, end = end, end + file.shapes[name][0]
            if start < last and first < end:
                parts.append(file.tensor(name, slice(max(first - start, 0), min(last, end) - start)))
        return torch.cat(parts or [self._files[0].tensor(name, slice(0, 0))])

    def _fault(self, name: str) -> str | None:
        """A phrase about parts of different shapes; None if they fit together."""
        shapes, axis = [list(file.shapes[name]) for file in self._files], self._axes[name]
        if len({tuple(size for dim, size in enumerate(shape) if dim != axis) for shape in shapes}) == 1:
            return None
        return f"the parts of `{name}` have the shapes {', '.join(map(str, shapes))}"

    def _joined_shape(self, name: str) -> Shape:
        shape, axis = self._files[0].shapes[name], self._axes[name]
        if axis is None:
            return shape
        return (*shape[:axis], sum(file.shapes[name][axis] for file in self._files), *shape[axis + 1 :])

    def _check(self, faults: Sequence[str]) -> None:
        if faults:
            raise WeightsError(
                f"{self.path.parent}: {len(self._files)} model-parallel files do not fit together: "
                f"{join_faults(faults)}. {_ONE_MODEL}"
            )


def _first_row(shape: Shape) -> slice:
    return slice(0, 1) if shape else ALL_ROWS


def _equal_values(files: Sequence[TensorStore], name: str, rows: slice, consequence: str) -> Tensor:
    """Read a tensor from the first file. Raises WeightsError if another file holds other values."""
    values = files[0].tensor(name, rows)
    for other in files[1:]:
        if other.shapes[name] != files[0].shapes[name] or not same_values(values, other.tensor(name, rows)):
            raise WeightsError(f"{files[0].path} and {other.path} differ in `{name}`, so {consequence}")
    return values


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape and values. Their dtypes may differ."""
    return a.shape == b.shape and bool((a == b).all())


def _check_plain(path: Path, dtypes: Mapping[str, str]) -> None:
    """Raise WeightsError if a tensor of a file has a dtype whose numbers are not the weights."""
    others = [f"`{name}` is {dtype.removeprefix('torch.')}" for name, dtype in dtypes.items() if dtype not in _PLAIN]
    if others:
        raise WeightsError(
            f"{path}: expected floats of 16, 32 or 64 bits; {join_faults(others)}. Such numbers are weights only with "
            "the scales of a quantisation, which ARC-DS does not compute. Use the model's weights in bfloat16, or a "
            ".gguf file. If the file is no part of the model, move it out of the folder."
        )

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
# Names of safetensors and of torch. Numbers of other dtypes mean something only with the scales of a quantisation.
_PLAIN = frozenset(("F64", "F32", "F16", "BF16", "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16"))


class TensorStore(Protocol):
    """Named tensors in files. Only `tensor` touches the data."""

    @property
    def path(self) -> Path:
        """The file, or the first one of several."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor, from the headers."""

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
        _check_plain(path, {name: entry.get_dtype() for name, entry in entries.items()})

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
        _check_plain(path, {n: str(t.dtype) for n, t in loaded.items()})

    def tensor(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        return self._tensors[name][rows]


class JoinedStore:
    """Several files, read as one.

    axis_of: the axis along which the parts of a tensor are concatenated, from its name and the shape of a part; None
        for a vector, of which each file holds the same values. By default a tensor in several files is a copy.

    Raises WeightsError if copies differ. At first it compares their shapes and their first rows. `tensor` compares the
    rows that it reads.
    """

    def __init__(self, files: Sequence[TensorStore], axis_of: Callable[[str, Shape], int | None] | None = None) -> None:
        self.path = files[0].path
        self._holds_copies = axis_of is None
        self._parts: dict[str, list[TensorStore]] = {}
        for file in files:
            for name in file.shapes:
                self._parts.setdefault(name, []).append(file)
        self._axes: dict[str, int | None] = {}
        shapes: dict[str, Shape] = {}
        for name, parts in self._parts.items():
            shape = parts[0].shapes[name]
            axis = axis_of(name, shape) if axis_of is not None and len(parts) > 1 else None
            if axis is not None:
                shape = (*shape[:axis], sum(part.shapes[name][axis] for part in parts), *shape[axis + 1 :])
            shapes[name], self._axes[name] = shape, axis
        self.shapes: Mapping[str, Shape] = shapes
        for name in self._parts:
            if self._is_copied(name):
                self.tensor(name, slice(0, 1) if shapes[name] else ALL_ROWS)

    def tensor(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        parts, axis = self._parts[name], self._axes[name]
        if axis is None:
            values = parts[0].tensor(name, rows)
            for other in parts[1:] if self._is_copied(name) else ():
                if other.shapes[name] != self.shapes[name] or not same_values(values, other.tensor(name, rows)):
                    raise WeightsError(
                        f"{parts[0].path} and {other.path} differ in `{name}`, so one of them belongs to other "
                        "weights. Move that file out of the folder."
                    )
            return values
        return torch.cat([part.tensor(name) for part in parts], dim=axis)[rows]

    def _is_copied(self, name: str) -> bool:
        return self._holds_copies and len(self._parts[name]) > 1


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

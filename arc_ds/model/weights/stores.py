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
from arc_ds.model.weights.names import Shape

ALL_ROWS = slice(None)


class TensorStore(Protocol):
    """Named tensors in files. Only `tensor` touches the data."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor, from the headers."""

    def tensor(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        """Read a tensor, or a slice of its dimension 0, to the CPU in the file's dtype."""


class SafetensorsStore:
    """One safetensors file. Raises WeightsError if it is damaged or truncated (the header gives the expected size)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = safe_open(path, framework="pt")
            names = self._file.keys()
            self.shapes: Mapping[str, Shape] = {n: tuple(self._file.get_slice(n).get_shape()) for n in names}
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{path} is not a complete safetensors file: {error}. It was cut short or damaged; copy it again."
            ) from error

    def tensor(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        if rows == ALL_ROWS:
            return self._file.get_tensor(name)
        return self._file.get_slice(name)[rows]


class PickleStore:
    """One .pth file, memory-mapped and restricted to plain tensors (`weights_only`).

    Raises WeightsError if it is damaged, too old to be mapped, or contains anything but tensors: a pickle can run code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            raise WeightsError(
                f"{path} holds more than tensors. It is not opened, because a pickle can run code "
                f"({words_of(error)}). Get the weights as safetensors."
            ) from error
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            raise WeightsError(
                f"{path} cannot be mapped as a PyTorch checkpoint: {words_of(error)}. Copy it again; a file from "
                "before PyTorch 1.6 must be saved again."
            ) from error
        if not isinstance(loaded, dict):
            raise WeightsError(f"{path}: expected a dict of tensors, got {type(loaded).__name__}")
        self._tensors = {n: t for n, t in loaded.items() if isinstance(t, Tensor)}
        self.shapes: Mapping[str, Shape] = {n: tuple(t.shape) for n, t in self._tensors.items()}

    def tensor(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        return self._tensors[name][rows]


class JoinedStore:
    """Several files, read as one.

    A tensor in several files is concatenated along `axis_of(name, shape of a part)`. If the axis is None, the files
    hold copies.
    """

    def __init__(
        self, files: Sequence[TensorStore], axis_of: Callable[[str, Shape], int | None] = lambda name, shape: None
    ) -> None:
        self._parts: dict[str, list[TensorStore]] = {}
        for file in files:
            for name in file.shapes:
                self._parts.setdefault(name, []).append(file)
        self._axes: dict[str, int | None] = {}
        shapes: dict[str, Shape] = {}
        for name, parts in self._parts.items():
            shape = parts[0].shapes[name]
            axis = axis_of(name, shape) if len(parts) > 1 else None
            if axis is not None:
                shape = (*shape[:axis], sum(part.shapes[name][axis] for part in parts), *shape[axis + 1 :])
            shapes[name], self._axes[name] = shape, axis
        self.shapes: Mapping[str, Shape] = shapes

    def tensor(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        parts, axis = self._parts[name], self._axes[name]
        if axis is None:
            return parts[0].tensor(name, rows)
        return torch.cat([part.tensor(name) for part in parts], dim=axis)[rows]

"""Tensor files. Names and shapes are available immediately; tensors, or some of their rows, are read one at a time."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from arc_ds.errors import WeightsError
from arc_ds.model.weights.names import Shape

ALL_ROWS = slice(None)


class TensorStore(Protocol):
    """Named tensors in files. Only `read` touches the data."""

    def names(self) -> frozenset[str]:
        """Names of all tensors in the file."""

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, from the header."""

    def read(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        """Read a tensor, or a slice of its dimension 0, to the CPU in the file's dtype."""


class SafetensorsStore:
    """One safetensors file. Raises WeightsError if it is damaged or truncated (the header gives the expected size)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = safe_open(path, framework="pt")
            self._shapes = {n: tuple(self._file.get_slice(n).get_shape()) for n in self._file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{path} is not a complete safetensors file: {error}. It was cut short or damaged; copy it again."
            ) from error

    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> Shape:
        return self._shapes[name]

    def read(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
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
                f"({_first_line(error)}). Get the weights as safetensors."
            ) from error
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            raise WeightsError(
                f"{path} cannot be mapped as a PyTorch checkpoint: {_first_line(error)}. Copy it again; a file from "
                "before PyTorch 1.6 must be saved again."
            ) from error
        if not isinstance(loaded, dict):
            raise WeightsError(f"{path}: expected a dict of tensors, got {type(loaded).__name__}")
        self._tensors = {n: t for n, t in loaded.items() if isinstance(t, Tensor)}

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> Shape:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        return self._tensors[name][rows]


class JoinedStore:
    """Several files, read as one.

    A tensor in several files is concatenated along `axis_of(name, shape of a part)`. If the axis is None, the files
    hold copies.
    """

    def __init__(self, parts: Sequence[TensorStore], axis_of: Callable[[str, Shape], int | None]) -> None:
        self._axis_of = axis_of
        self._holders: dict[str, list[TensorStore]] = {}
        for part in parts:
            for name in part.names():
                self._holders.setdefault(name, []).append(part)

    def names(self) -> frozenset[str]:
        return frozenset(self._holders)

    def shape(self, name: str) -> Shape:
        holders = self._holders[name]
        first = holders[0].shape(name)
        axis = self._axis_of(name, first) if len(holders) > 1 else None
        if axis is None:
            return first
        total = sum(holder.shape(name)[axis] for holder in holders)
        return (*first[:axis], total, *first[axis + 1 :])

    def read(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        holders = self._holders[name]
        axis = self._axis_of(name, holders[0].shape(name)) if len(holders) > 1 else None
        if axis is None:
            return holders[0].read(name, rows)
        return torch.cat([holder.read(name) for holder in holders], dim=axis)[rows]


def one_file_each(name: str, shape: Shape) -> int | None:
    """Axis rule for files without shared tensors: a name in two files is a copy."""
    del name, shape
    return None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__

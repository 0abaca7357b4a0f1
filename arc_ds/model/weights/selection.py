"""A part of a source's tensors, under other names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from arc_ds.model.weights.load import TensorSource
from arc_ds.model.weights.names import Shape
from arc_ds.model.weights.stores import ALL_ROWS

MEMORY = "encoder.memory"


@dataclass(frozen=True, kw_only=True)
class SelectedTensors:
    """Some tensors of a source. It is a `TensorSource` itself.

    source: the source.
    names: for each tensor, its name in the source. Two tensors may have the same one.
    num_rows: number of first rows to use of a tensor; all rows of a tensor that it does not name.
    """

    source: TensorSource
    names: Mapping[str, str]
    num_rows: Mapping[str, int] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Origin of the tensors, for messages."""
        return self.source.path

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor, without reading it."""
        whole = {name: self.source.shapes[theirs] for name, theirs in self.names.items()}
        return whole | {name: (rows, *whole[name][1:]) for name, rows in self.num_rows.items()}

    def tensor(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        """Read a tensor, or a slice of its rows, to the CPU."""
        num_rows = self.num_rows.get(name)
        if num_rows is not None:
            rows = slice(*rows.indices(num_rows))
        return self.source.tensor(self.names[name], rows)


def use_memory_tokens(source: TensorSource, num: int) -> TensorSource:
    """The source with its first `num` memory tokens. If it has no more than these, it is returned as it is."""
    shape = source.shapes.get(MEMORY)
    if shape is None or shape[0] <= num:
        return source
    return SelectedTensors(source=source, names={name: name for name in source.shapes}, num_rows={MEMORY: num})

"""The operators of arc_kernels that run in a context."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class RecordedOperators(TorchDispatchMode):
    """Records the names of the arc_kernels operators that run in its context."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "arc_kernels":
            self.names.add(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))

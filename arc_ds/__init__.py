"""ARC-DS: training and use of ARC-Encoders (Adaptable text Representations Compressor, arXiv 2510.20535)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from arc_ds.version import __version__

if TYPE_CHECKING:
    from arc_ds.batch.segments import Segment
    from arc_ds.inference.arc import ArcModel
    from arc_ds.inference.prompt import Context, Vectors

__all__ = ["ArcModel", "Context", "Segment", "Vectors", "__version__"]

_PUBLIC = {
    "ArcModel": "arc_ds.inference.arc",
    "Context": "arc_ds.inference.prompt",
    "Segment": "arc_ds.batch.segments",
    "Vectors": "arc_ds.inference.prompt",
}


def __getattr__(name: str) -> Any:
    """Import the public classes at their first use, because `import arc_ds` alone must not load torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)

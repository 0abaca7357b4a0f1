"""ARC-DS: training and use of ARC-Encoders (Adaptable text Representations Compressor, arXiv 2510.20535)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arc_ds.data.segments import Segment
    from arc_ds.model.arc import ArcModel, Context

__version__ = "0.1.0"
__all__ = ["ArcModel", "Context", "Segment", "__version__"]

_PUBLIC = {"ArcModel": "arc_ds.model.arc", "Context": "arc_ds.model.arc", "Segment": "arc_ds.data.segments"}


def __getattr__(name: str) -> Any:
    """The public classes, imported when first asked for: `import arc_ds` alone must not load torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)

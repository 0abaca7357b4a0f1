"""States of this process's random generators as JSON. A resumed run continues the same random sequences."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch

from arc_ds.errors import CheckpointError


def capture_rng() -> dict[str, Any]:
    """States of the generators of Python, numpy and torch, and of the current accelerator if it is in use."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],  # type: ignore[union-attr]
        "torch": _encode(torch.get_rng_state()),
    }
    if (device := _accelerator_in_use()) is not None:
        state["accelerator"] = _encode(device.get_rng_state())
    return state


def restore_rng(state: dict[str, Any], source: object) -> None:
    """Restore the states that `capture_rng` returned. Raises CheckpointError if they do not fit this program.

    source: their file, for messages.
    """
    try:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, position, *rest = state["numpy"]
        if not 0 <= position <= len(keys):  # numpy would read beyond its keys
            raise ValueError(f"numpy's position is {position}")
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, *rest))
        torch.set_rng_state(_decode(state["torch"]))
        if "accelerator" in state and (device := _accelerator_in_use()) is not None:
            device.set_rng_state(_decode(state["accelerator"]))
    except (LookupError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(
            f"the random states in {source} do not fit this program: {error!r}. Use another checkpoint of the run."
        ) from error


def _accelerator_in_use() -> Any | None:
    """The torch module of this process's accelerator (`torch.cuda`, ...), or None if none has been used."""
    device = torch.accelerator.current_accelerator(check_available=True)
    module = None if device is None else torch.get_device_module(device)
    return module if module is not None and module.is_initialized() else None


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

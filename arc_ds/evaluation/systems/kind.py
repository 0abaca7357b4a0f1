"""The interface of kinds of systems: their keys in a config, and how a system is built from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from arc_ds.evaluation.protocol import Protocol
from arc_ds.evaluation.systems.system import System


@dataclass(frozen=True, kw_only=True)
class SystemSettings:
    """The settings that all systems of an evaluation share, and the name of one of them.

    name: its name in results and tables.
    protocol: see `Protocol`.
    seed: seed of sampling.
    device: device of all weights.
    dtype: dtype of all weights.
    """

    name: str
    protocol: Protocol
    seed: int
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class SystemKind:
    """A kind of system, for `systems.KINDS`.

    section: frozen keyword-only dataclass of the keys that a config gives for a system of this kind, with a docstring
        under each field and ranges (`arc_ds.config.ranges`). The keys `kind` and `name` are the config's own.
    build: makes a system from its section. Raises ConfigError, WeightsError or TokenizerError.
    """

    section: type
    build: Callable[[Any, SystemSettings], System]

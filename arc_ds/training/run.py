"""Run: everything with a lifetime that a training run holds, built by `build.py`, driven by `loop.py`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from arc_ds.config.schema import RunConfig
from arc_ds.data.loader import StepData, make_loader
from arc_ds.data.step_batch import StepBatch
from arc_ds.errors import ArcError
from arc_ds.model.spec import CompressorSpec
from arc_ds.training.engine import PlacedDecoder
from arc_ds.training.schedule import RateSchedule
from arc_ds.training.validate import Validator

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(kw_only=True)
class Run:
    """A run in memory.

    tokenizers: fingerprints of those in use, by their keys in the config.
    step: optimizer steps done; the next batch is that of step number `step`. skipped_steps: how many of them changed
    nothing because a loss or gradient was not finite; skipped_in_row: of these, the ones since the last that did.
    """

    config: RunConfig
    folder: Path
    device: torch.device
    spec: CompressorSpec
    engine: DeepSpeedEngine
    decoders: tuple[PlacedDecoder, ...]
    data: StepData
    schedule: RateSchedule
    validator: Validator | None
    tasks: tuple[str, ...]
    tokenizers: Mapping[str, str] = field(default_factory=dict)
    step: int = 0
    skipped_steps: int = 0
    skipped_in_row: int = 0
    clock: DataClock = field(default_factory=lambda: DataClock())

    @property
    def pin_memory(self) -> bool:
        """Whether batches are made in page-locked memory, for copies to the device that nothing waits for."""
        return self.device.type != "cpu"

    @property
    def decoder_names(self) -> tuple[str, ...]:
        """Names of the decoders, in the order of the ports."""
        return tuple(decoder.name for decoder in self.config.decoders)

    def count_step(self, *, applied: bool) -> None:
        """One more optimizer step is done; applied: whether it changed anything."""
        self.step += 1
        self.skipped_steps += not applied
        self.skipped_in_row = 0 if applied else self.skipped_in_row + 1

    def batches(self) -> Iterator[StepBatch]:
        """This rank's batches from the current step to the last; the time spent waiting goes to `clock`.

        DataError where a record cannot be used and the config does not say to skip it.
        """
        steps = range(self.step, self.config.steps)
        num_workers = self.config.data.num_workers
        loader = iter(make_loader(self.data, steps, num_workers=num_workers, pin_memory=self.pin_memory))
        while True:
            started = time.perf_counter()
            try:
                batch = next(loader, None)
            except ArcError as error:
                raise type(error)(_own_words(error)) from None
            self.clock.waited_s += time.perf_counter() - started
            if batch is None:
                return
            yield batch


def _own_words(error: ArcError) -> str:
    """The message without the worker's traceback, which torch's DataLoader writes in front of it."""
    return str(error).rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")[2].strip()


@dataclass
class DataClock:
    """Seconds spent waiting for data since it was last read."""

    waited_s: float = 0.0

    def read(self) -> float:
        """The seconds so far, and a new start."""
        waited, self.waited_s = self.waited_s, 0.0
        return waited

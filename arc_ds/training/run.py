"""Run: the state of a training run. `build.py` builds it and `loop.py` drives it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from arc_ds.data.loading.loader import StepData
from arc_ds.data.loading.workers import BatchLoader
from arc_ds.launch.signals import StopRequest
from arc_ds.model.spec import CompressorSpec
from arc_ds.training.engine import PlacedDecoder
from arc_ds.training.loss import Normalize
from arc_ds.training.ports import SavedPorts
from arc_ds.training.schedule import RateSchedule
from arc_ds.training.spikes import SpikeGuard
from arc_ds.training.validate import Validator

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from arc_ds.training.evaluate import Evaluator


@dataclass(frozen=True, kw_only=True)
class InputDigests:
    """Digests of a run's input files. A resumed run must have the same ones, at whatever paths.

    data: fingerprint of shards, weights of sources, and order.
    tokenizers: fingerprints of tokenizers and chat templates by config key.
    backbones: weight digests by config key (`weight_digests`).
    """

    data: str
    tokenizers: Mapping[str, str]
    backbones: Mapping[str, str]


@dataclass(kw_only=True)
class Run:
    """A run in memory.

    spec: of the compressor in the engine, which has the ports of the trained decoders.
    ds_config: resolved DeepSpeed config of the training engine.
    inputs: see `InputDigests`.
    ports: the ports of its checkpoints.
    decoder_names: of the trained decoders, in the order of the compressor's ports.
    num_workers: processes that make this rank's batches.
    step: number of optimizer steps done, and zero-based number of the next step.
    skipped_steps: steps without an update because the loss or a gradient was not finite, or a spike.
    skipped_in_row: skipped steps since the last update.
    spikes: decides which steps are spikes; None if none is.
    data_counts: records skipped, cut or changed, over all ranks (`meters.COUNTS`), as of the last report.
    clock: time that this rank waited for data.
    is_stopping: all ranks agreed, outside a step, to stop.
    around_pauses: contexts around work between steps, which they get by name. They flush state before it and restart
        timers after it.
    """

    folder: Path
    device: torch.device
    spec: CompressorSpec
    inputs: InputDigests
    ports: SavedPorts
    engine: DeepSpeedEngine
    ds_config: Mapping[str, Any]
    decoders: tuple[PlacedDecoder, ...]
    decoder_names: tuple[str, ...]
    data: StepData
    num_workers: int
    schedule: RateSchedule
    normalize: Normalize
    validator: Validator | None
    evaluator: Evaluator | None = None
    step: int = 0
    skipped_steps: int = 0
    skipped_in_row: int = 0
    spikes: SpikeGuard | None = None
    data_counts: Counter[str] = field(default_factory=Counter)
    clock: DataClock = field(default_factory=lambda: DataClock())
    is_stopping: bool = False
    around_pauses: list[Callable[[Run, str], AbstractContextManager[None]]] = field(default_factory=list)

    @property
    def total_steps(self) -> int:
        """Number of steps of the whole run."""
        return self.schedule.total_steps

    @property
    def decoder_engines(self) -> dict[str, DeepSpeedEngine]:
        """Engines of the sharded decoders, by name."""
        placed = zip(self.decoder_names, self.decoders, strict=True)
        return {name: decoder.engine for name, decoder in placed if decoder.engine is not None}

    def count_step(self, *, applied: bool) -> None:
        """Count one optimizer step. applied: whether it updated the weights."""
        self.step += 1
        self.skipped_steps += not applied
        self.skipped_in_row = 0 if applied else self.skipped_in_row + 1

    def batches(self, stop: StopRequest) -> BatchLoader:
        """This rank's batches from the current step to the last one, or to a stop request."""
        return BatchLoader(
            self.data,
            range(self.step, self.total_steps),
            num_workers=self.num_workers,
            pin_memory=self.device.type != "cpu",
            is_stopped=stop.is_set,
        )

    @contextmanager
    def pause(self, work: str = "") -> Iterator[None]:
        """Context for work between steps. Collective. work: its name in the metrics, e.g. "save"."""
        with ExitStack() as stack:
            for around in self.around_pauses:
                stack.enter_context(around(self, work))
            yield


@dataclass
class DataClock:
    """Data waits of this rank since the last reading.

    waited_s: seconds spent waiting for data.
    remade: batches repacked during that time.
    """

    waited_s: float = 0.0
    remade: int = 0

    @contextmanager
    def waiting(self, *, remade: int = 0) -> Iterator[None]:
        """Time a block that waits for data."""
        started = time.perf_counter()
        yield
        self.waited_s += time.perf_counter() - started
        self.remade += remade

    def read(self) -> tuple[float, int]:
        """Return `waited_s` and `remade`, and reset them."""
        reading = self.waited_s, self.remade
        self.waited_s, self.remade = 0.0, 0
        return reading

"""Run: the state of a training run. `build.py` builds it and `loop.py` drives it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from arc_ds.config.schema import RunConfig
from arc_ds.data.loading.loader import StepData, hold_open, let_go, make_loader
from arc_ds.data.loading.micro_batches import pack_again
from arc_ds.data.loading.step_batch import StepBatch
from arc_ds.errors import ArcError, DataError
from arc_ds.launch.signals import StopRequest
from arc_ds.model.spec import CompressorSpec
from arc_ds.training.engine import PlacedDecoder
from arc_ds.training.schedule import RateSchedule
from arc_ds.training.validate import Validator

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(kw_only=True)
class Run:
    """A run in memory.

    ds_config: resolved DeepSpeed config of the training engine.
    tokenizers: tokenizer fingerprints by config key.
    decoder_ids: digest of the ids of each decoder's tokenizer (`tokenizers.ids_digest`).
    backbones: weight digests (`weight_digests`).
    step: number of optimizer steps done, and zero-based number of the next step.
    skipped_steps: steps without an update because the loss or a gradient was not finite.
    skipped_in_row: skipped steps since the last update.
    data_counts: records skipped, cut or changed, over all ranks (`meters.COUNTS`), as of the last report.
    clock: time that this rank waited for data.
    is_stopping: all ranks agreed, outside a step, to stop.
    pauses: callbacks around work between steps.
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
    ds_config: Mapping[str, Any] = field(default_factory=dict)
    tokenizers: Mapping[str, str] = field(default_factory=dict)
    decoder_ids: tuple[str, ...] = ()
    backbones: Mapping[str, str] = field(default_factory=dict)
    step: int = 0
    skipped_steps: int = 0
    skipped_in_row: int = 0
    data_counts: Counter[str] = field(default_factory=Counter)
    clock: DataClock = field(default_factory=lambda: DataClock())
    is_stopping: bool = False
    pauses: Pauses = field(default_factory=lambda: Pauses())

    @property
    def pin_memory(self) -> bool:
        """Whether batches use page-locked memory, which allows asynchronous copies to the device."""
        return self.device.type != "cpu"

    @property
    def decoder_names(self) -> tuple[str, ...]:
        """Names of the decoders, in port order."""
        return tuple(decoder.name for decoder in self.config.decoders)

    def count_step(self, *, applied: bool) -> None:
        """Count one optimizer step. applied: whether it updated the weights."""
        self.step += 1
        self.skipped_steps += not applied
        self.skipped_in_row = 0 if applied else self.skipped_in_row + 1

    def batches(self, stop: StopRequest) -> Iterator[StepBatch]:
        """Yield this rank's batches from the current step to the last one; `clock` records the waiting time.

        Iteration stops as soon as a stop is requested, without waiting for workers: one may be blocked on a dead
        server. Without workers, the batch in progress is completed first. Raises DataError if a worker was killed, or
        if a record is invalid and the config does not skip such records.
        """
        steps = range(self.step, self.config.steps)
        num_workers = self.config.data.num_workers
        loader = iter(make_loader(self.data, steps, num_workers=num_workers, pin_memory=self.pin_memory))
        hold_open(loader)
        while True:
            with self.clock.waiting():
                try:
                    batch = next(loader, None) if num_workers == 0 else stop.wait_for(partial(next, loader, None))
                except ArcError as error:
                    raise type(error)(_own_words(error)) from None
                except RuntimeError as error:  # torch's DataLoader has no exception class for killed workers
                    if not str(error).startswith("DataLoader worker"):
                        raise
                    raise DataError(
                        f"{error}. The worker was killed, most likely because the host ran out of memory. Lower "
                        "data.num_workers or the number of ranks on this host."
                    ) from error
            if batch is None:
                if stop.received is None:
                    let_go(loader)
                return
            yield batch

    def make_again(self, batch: StepBatch, num_splits: int) -> StepBatch:
        """Repack the samples of a batch into `num_splits` micro-batches per decoder, in this process."""
        with self.clock.waiting(remade=1):
            again = pack_again(batch, num_splits, self.data.pooling, self.data.limits)
            return again.pin_memory() if self.pin_memory else again


def _own_words(error: ArcError) -> str:
    """The message without the worker's traceback that torch's DataLoader prepends to it."""
    return str(error).rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")[2].strip()


class Pauses:
    """Callbacks around work between steps such as a save. They flush state before it and restart timers after it."""

    def __init__(self) -> None:
        self._around: list[tuple[Callable[[Run], None], Callable[[], None]]] = []

    def add(self, before: Callable[[Run], None], after: Callable[[], None]) -> None:
        """Call `before` on all ranks at the start of each pause, and `after` at its end."""
        self._around.append((before, after))

    @contextmanager
    def pause(self, run: Run) -> Iterator[None]:
        """Context for work between steps. Collective."""
        for before, _ in self._around:
            before(run)
        yield
        for _, after in self._around:
            after()


class DataWait(NamedTuple):
    """Data waits of this rank.

    waited_s: seconds spent waiting for data.
    remade: batches repacked during that time.
    """

    waited_s: float = 0.0
    remade: int = 0


class DataClock:
    """Adds up the time that this rank waits for data."""

    def __init__(self) -> None:
        self._so_far = DataWait()

    @contextmanager
    def waiting(self, *, remade: int = 0) -> Iterator[None]:
        """Time a block that waits for data."""
        started = time.perf_counter()
        yield
        waited_s = self._so_far.waited_s + time.perf_counter() - started
        self._so_far = DataWait(waited_s, self._so_far.remade + remade)

    def read(self) -> DataWait:
        """Return the sums since the last call and reset them."""
        read, self._so_far = self._so_far, DataWait()
        return read

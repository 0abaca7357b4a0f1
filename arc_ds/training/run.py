"""Run: everything with a lifetime that a training run holds, built by `build.py`, driven by `loop.py`."""

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

    ds_config: of the engine that trains, resolved.
    tokenizers: fingerprints of those in use, by their keys in the config; backbones: digests (`weight_digests`).
    step: optimizer steps done; the next batch is that of step number `step`. skipped_steps: how many of them changed
    nothing because a loss or gradient was not finite; skipped_in_row: of these, the ones since the last that did.
    data_counts: records skipped, cut or changed so far, over all ranks (`meters.COUNTS`), as of the last report.
    is_stopping: all ranks have agreed, outside a step, that there is to be no further one.
    pauses: everything that has to be done around work that is not a step.
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

    def batches(self, stop: StopRequest) -> Iterator[StepBatch]:
        """This rank's batches from the current step to the last; the time spent waiting goes to `clock`.

        They end where the stop is asked for: no worker is waited for then, which may be at a server that hangs. (A
        batch that no worker makes is made to its end.) DataError where a record cannot be used and the config does not
        say to skip it, or a worker was killed.
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
                except RuntimeError as error:  # of torch's DataLoader, which has no class of its own for it
                    if not str(error).startswith("DataLoader worker"):
                        raise
                    raise DataError(
                        f"{error}. It was killed, mostly for want of memory on this host: lower data.num_workers or "
                        "the number of ranks of the host."
                    ) from error
            if batch is None:
                if stop.received is None:
                    let_go(loader)
                return
            yield batch

    def make_again(self, batch: StepBatch, num_splits: int) -> StepBatch:
        """The same samples in `num_splits` micro-batches for each decoder; packed here, while the run waits."""
        with self.clock.waiting(remade=1):
            again = pack_again(batch, num_splits, self.data.pooling, self.data.limits)
            return again.pin_memory() if self.pin_memory else again


def _own_words(error: ArcError) -> str:
    """The message without the worker's traceback, which torch's DataLoader writes in front of it."""
    return str(error).rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")[2].strip()


class Pauses:
    """Work between steps, such as a save: others may have to finish something before it and begin anew after it."""

    def __init__(self) -> None:
        self._around: list[tuple[Callable[[Run], None], Callable[[], None]]] = []

    def add(self, before: Callable[[Run], None], after: Callable[[], None]) -> None:
        """Call `before` at the beginning of each pause, on all ranks, and `after` at its end."""
        self._around.append((before, after))

    @contextmanager
    def pause(self, run: Run) -> Iterator[None]:
        """The block is no step; a collective."""
        for before, _ in self._around:
            before(run)
        yield
        for _, after in self._around:
            after()


class DataWait(NamedTuple):
    """What data have cost this rank. waited_s: seconds; remade: batches that were made again while it waited."""

    waited_s: float = 0.0
    remade: int = 0


class DataClock:
    """Adds up what this rank waits for data."""

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
        """What has come together since the last reading."""
        read, self._so_far = self._so_far, DataWait()
        return read

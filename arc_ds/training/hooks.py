"""Hooks of the training loop: metrics, progress, validation, checkpoints and the watchdog."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from tqdm import tqdm

from arc_ds.config.schema import EncoderConfig
from arc_ds.data.loading.step_batch import StepBatch
from arc_ds.planning.flops import count_flops
from arc_ds.system import dist
from arc_ds.system.device import GIB, peak_memory_bytes
from arc_ds.training.meters import COUNTS, Meter, Totals
from arc_ds.training.run import Run
from arc_ds.training.step import StepResult
from arc_ds.training.validate import TaskScores, ValidationStopped, Validator
from arc_ds.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

LogMetrics = Callable[[int, dict[str, float]], None]

# Logged with every validation, independent of decoders and tasks.
VALIDATION_KEY = "validation/seconds"


class Hook:
    """A hook of the training loop, called on every rank. By default it does nothing. Hooks may contain collectives.

    priority: hooks with lower numbers run first. Metrics run before all hooks that write. The checkpoint is saved
        before validation because validation may take long.
    """

    priority = 99

    def on_start(self, run: Run) -> None:
        """Called before the first step of this process."""

    def after_step(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        """Called after each step; `run.step` already includes it."""

    def on_end(self, run: Run) -> None:
        """Called after the last step, also if a stop was requested."""


@dataclass
class WatchdogHook(Hook):
    """Resets the watchdog after each step."""

    priority = 0
    watchdog: Watchdog

    def after_step(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        self.watchdog.alive()


@dataclass(kw_only=True)
class MetricsHook(Hook):
    """Logs loss, gradient norm and learning rates of every step; every `every` steps also speed, memory and data.

    Step results stay on the device until the next report, so the step itself never synchronizes for them.

    log: logs the metrics of a step.
    encoder: its trained parts, for MFU.
    peak_flops: peak FLOP/s of the device, for MFU: required operations as a share of the peak (`flops.py`). None: no
        MFU. There is none for decoders of transformers either, whose operations are only estimated.
    """

    priority = 10
    log: LogMetrics
    every: int
    encoder: EncoderConfig
    peak_flops: float | None
    _pending: list[StepResult] = field(default_factory=list, init=False)
    _meter: Meter = field(default_factory=Meter, init=False)
    _started: float = field(default=0.0, init=False)
    _bar: tqdm = field(init=False)

    def on_start(self, run: Run) -> None:
        self._started = time.perf_counter()
        if self.peak_flops is not None and any(p.module.implementation == "transformers" for p in run.decoders):
            logger.info("no train/mfu: the operations of decoders that run through transformers are only estimated")
            self.peak_flops = None
        run.around_pauses.append(self._around_pause)
        self._bar = _progress_bar("train", run.total_steps, initial=run.step, unit="step", dynamic_ncols=True)

    def after_step(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        self._pending.append(result)
        self._meter.add(batch, self._flops(run, batch))
        self._bar.update()
        if run.step % self.every == 0:
            self.flush(run)

    def on_end(self, run: Run) -> None:
        self.flush(run)
        self._bar.close()

    def flush(self, run: Run) -> None:
        """Log all pending step results. Collective."""
        if not self._pending:
            return
        elapsed = time.perf_counter() - self._started
        rows = [(result.step + 1, _step_metrics(run, result)) for result in self._pending]
        totals = self._meter.read(run.clock, run.device)
        run.data_counts.update({name: totals.sums[name] for name in COUNTS})
        rows[-1][1].update(self._speed(run, totals, elapsed), **_data_metrics(run, totals))
        for step, metrics in rows:
            self.log(step, metrics)
        self._report(run, rows[-1][1], elapsed / len(rows))
        self._pending, self._started = [], time.perf_counter()

    @contextmanager
    def _around_pause(self, run: Run) -> Iterator[None]:
        self.flush(run)
        yield
        self._started = time.perf_counter()

    def _flops(self, run: Run, batch: StepBatch) -> list[int]:
        """Operations of each micro-batch of this rank, computed from sequence lengths on the host."""
        return [
            count_flops(
                micro.batch,
                run.spec,
                run.decoders[micro.decoder_idx].module.sizes,
                **self.encoder.trained_parts,
            ).total
            for micro in batch.micro_batches
        ]

    def _speed(self, run: Run, totals: Totals, elapsed: float) -> dict[str, float]:
        peak = self.peak_flops
        mfu = {} if peak is None else {"train/mfu": totals.flops / (elapsed * dist.world_size() * peak)}
        return mfu | {
            **{
                f"speed/{name}_per_s": totals.sums[name] / elapsed
                for name in ("encoder_tokens", "decoder_rows", "labels")
            },
            "speed/step_s": elapsed / totals.num_steps,
            "speed/data_wait_share": totals.waited_s / elapsed,
            "memory/peak_gib": peak_memory_bytes(run.device) / GIB,
            "train/skipped_steps": float(run.skipped_steps),
        }

    def _report(self, run: Run, metrics: dict[str, float], step_s: float) -> None:
        loss, tokens = metrics["train/loss"], metrics["speed/encoder_tokens_per_s"]
        if not self._bar.disable:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens:,.0f} encoder tokens/s")
            return
        remaining = timedelta(seconds=int((run.total_steps - run.step) * step_s))
        logger.info(
            "step %d of %d: loss %.4f, gradient norm %.2f, %s encoder tokens/s, %.2f s/step, %s left",
            *(run.step, run.total_steps, loss, metrics["train/grad_norm"], f"{tokens:,.0f}", step_s, remaining),
        )


@dataclass(kw_only=True)
class ValidationHook(Hook):
    """Validates every `every` steps and at the end of the run (0: only at the end), and logs the scores.

    After a stop request there may be little time left to save. The hook then aborts or skips the validation, and the
    next start of the run catches up on it.

    log: logs the metrics of a step.
    done: last validated step, also of an earlier start of the run; None if there is none.
    alive: called before each batch to reset the watchdog.
    is_stopped: whether this rank has received a stop request.
    """

    priority = 40
    log: LogMetrics
    every: int
    done: int | None
    alive: Callable[[], None]
    is_stopped: Callable[[], bool]

    def on_start(self, run: Run) -> None:
        if self.every and run.step % self.every == 0 and self.done != run.step:
            self._validate(run)

    def after_step(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        if self.every and run.step % self.every == 0 and not result.notices.ends_run:
            self._validate(run)

    def on_end(self, run: Run) -> None:
        if run.step == run.total_steps and self.done != run.step and not run.is_stopping:
            self._validate(run)

    def _validate(self, run: Run) -> None:
        if run.validator is None:
            return
        with run.pause():  # flushes earlier steps, so step numbers in the log never decrease
            started = time.perf_counter()
            try:
                scores = self._scores(run, run.validator)
            except ValidationStopped:
                logger.info("step %d: validation aborted; the next start of the run catches up on it", run.step)
                run.is_stopping = True
                return
            self.done = run.step
            metrics = {VALIDATION_KEY: time.perf_counter() - started}
            num_samples = run.validator.num_samples_of_tasks
            for decoder, by_task, counts in zip(run.decoder_names, scores, num_samples, strict=True):
                for task, score in by_task.items():
                    metrics.update(score.as_metrics(f"validation/{decoder}/{task}"))
                    metrics[f"validation/{decoder}/{task}/num_samples"] = counts[task]
                    logger.info("step %d, %s, %s: %s", run.step, decoder, task, score)
            self.log(run.step, metrics)

    def _scores(self, run: Run, validator: Validator) -> list[dict[str, TaskScores]]:
        tasks, names = ", ".join(validator.tasks), ", ".join(run.decoder_names)
        logger.info("step %d: validating %d samples of %s for %s", run.step, validator.num_samples, tasks, names)
        with _progress_bar("validate", validator.num_forwards, leave=False) as bar:

            def before_forward() -> bool:
                bar.update()
                self.alive()
                return self.is_stopped()

            return validator.run(run.engine, run.decoders, before_forward)


@dataclass(kw_only=True)
class CheckpointHook(Hook):
    """Saves a checkpoint every `every` steps (0: only at the end or at a stop), after pending metrics are logged.

    save: starts to save a checkpoint.
    finish: waits until it is whole.
    has_failed: whether a save has failed on this rank for which the run must end.
    request_stop: called after that, so that the next step announces it to all ranks.
    """

    priority = 30
    save: Callable[[Run], None]
    finish: Callable[[], None]
    has_failed: Callable[[], bool]
    request_stop: Callable[[], None]
    every: int
    _last: int = field(default=-1, init=False)

    def on_start(self, run: Run) -> None:
        self._last = run.step  # the checkpoint that the run resumed from already exists

    def after_step(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        if self.has_failed():
            self.request_stop()
        if self.every and run.step % self.every == 0:
            self._save_once(run)

    def on_end(self, run: Run) -> None:
        self._save_once(run)
        self.finish()

    def _save_once(self, run: Run) -> None:
        if self._last == run.step:
            return
        with run.pause():
            self.save(run)
        self._last = run.step


def _progress_bar(desc: str, total: int, **options: Any) -> tqdm:
    """A bar on rank 0's terminal. Without a terminal it shows nothing."""
    return tqdm(desc=desc, total=total, disable=None if dist.is_main() else True, **options)


def _step_metrics(run: Run, result: StepResult) -> dict[str, float]:
    """Metrics of one step. Synchronizes with the device."""
    metrics = {
        "train/loss": float(result.loss),
        "train/grad_norm": float(result.grad_norm),
        "train/labels": float(result.labels_DK.sum()),
        **{f"lr/{name}": rate for name, rate in result.learning_rates.items()},
    }
    by_decoder = zip(result.decoder_idxs, result.nll_DK.tolist(), result.labels_DK.tolist(), strict=True)
    for decoder_idx, nll_K, labels_K in by_decoder:
        for task, nll, labels in zip(run.data.tasks, nll_K, labels_K, strict=True):
            if labels:
                metrics[f"train/loss/{run.decoder_names[decoder_idx]}/{task}"] = nll / labels
    return metrics


def _data_metrics(run: Run, totals: Totals) -> dict[str, float]:
    """Balance and fill of the micro-batches, and counts of skipped, cut or changed records since the run began.

    The use of a limit is the mean micro-batch size divided by that limit; limits of None have no such metric.
    """
    num_passes = totals.sums["micro_batches"]
    metrics = {
        "data/balance": totals.balance,
        "data/micro_batches": num_passes / (totals.num_steps * dist.world_size()),
        **{f"data/{name}": float(run.data_counts[name]) for name in COUNTS},
    }
    limits = {"encoder_tokens": run.data.limits.max_encoder_tokens, "decoder_rows": run.data.limits.max_decoder_rows}
    for name, limit in limits.items():
        mean = metrics[f"data/{name}_per_micro_batch"] = totals.sums[name] / num_passes
        if limit is not None:
            metrics[f"data/{name}_limit_use"] = mean / limit
    return metrics

"""Hooks of the training loop: metrics, progress, validation, checkpoints and the watchdog."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ClassVar

from tqdm import tqdm

from arc_ds.config.schema import EncoderConfig
from arc_ds.data.loading.step_batch import StepBatch
from arc_ds.planning.flops import count_flops
from arc_ds.system import activity, dist
from arc_ds.system.device import GIB, peak_memory_bytes
from arc_ds.training.collectives import ENCODER, Collective, CollectiveCounter, sent_bytes
from arc_ds.training.lockstep import EvaluationStopped
from arc_ds.training.memory import engine_memory, leaked_parameters
from arc_ds.training.meters import COUNTS, Meter, Totals
from arc_ds.training.run import Run
from arc_ds.training.step import StepResult
from arc_ds.training.validate import TaskScores, ValidationStopped, Validator
from arc_ds.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

LogMetrics = Callable[[int, dict[str, float]], None]

# Logged with every validation, independent of decoders and tasks.
VALIDATION_KEY = "validation/seconds"
# Logged with every evaluation.
EVALUATION_KEY = "eval/seconds"
# Pauses of a run that have metrics, by name.
SAVE, VALIDATION, EVALUATION = "save", "validation", "evaluation"

_MIB = 1 << 20


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
    """Logs loss, gradient norm and learning rates of every step; every `every` steps also speed, memory, network, data.

    Step results stay on the device until the next report, so the step itself never synchronizes for them. `README.md`
    lists the metrics.

    log: logs the metrics of a step.
    encoder: its trained parts, for MFU.
    peak_flops: peak FLOP/s of the device, for MFU: required operations as a share of the peak (`flops.py`). None: no
        MFU. There is none for decoders of transformers either, whose operations are only estimated.
    counter: counts the collectives of the steps. Without counts there are no metrics of the network.
    """

    priority = 10
    log: LogMetrics
    every: int
    encoder: EncoderConfig
    peak_flops: float | None
    counter: CollectiveCounter = field(default_factory=CollectiveCounter)
    _pending: list[StepResult] = field(default_factory=list, init=False)
    _meter: Meter = field(default_factory=Meter, init=False)
    _started: float = field(default=0.0, init=False)
    _paused_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float), init=False)
    _warned_of: set[str] = field(default_factory=set, init=False)
    _bar: tqdm = field(init=False)

    def on_start(self, run: Run) -> None:
        self._started = time.perf_counter()
        self.counter.read()
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
        collectives = self.counter.read()
        totals = self._meter.read(run.clock, run.device, peak_bytes=peak_memory_bytes(run.device), own=self._own(run))
        self.counter.read()  # those of this report
        run.data_counts.update({name: totals.sums[name] for name in COUNTS})
        rows[-1][1].update(
            self._speed(run, totals, elapsed),
            **_memory_metrics(totals),
            **_network_metrics(collectives, totals.num_steps, elapsed),
            **_data_metrics(run, totals),
        )
        for step, metrics in rows:
            self.log(step, metrics)
        self._report(run, rows[-1][1], elapsed / len(rows))
        self._pending, self._paused_s, self._started = [], defaultdict(float), time.perf_counter()

    @contextmanager
    def _around_pause(self, run: Run, work: str) -> Iterator[None]:
        self.flush(run)
        started = time.perf_counter()
        yield
        self.counter.read()  # those of the pause
        self._started = time.perf_counter()
        self._paused_s[work] += self._started - started
        if work == SAVE:
            self.log(run.step, {"checkpoint/seconds": self._started - started})

    def _own(self, run: Run) -> dict[str, float]:
        """Figures of this rank whose maxima over the ranks are logged. Warns of leaked parameters."""
        modules = {ENCODER: (run.engine.module, run.engine)} | {
            name: (placed.module, None) for name, placed in zip(run.decoder_names, run.decoders, strict=True)
        }
        figures: dict[str, float] = {f"{work}_s": self._paused_s[work] for work in (SAVE, VALIDATION, EVALUATION)}
        figures["leaked"] = 0.0
        for name, (module, trained_by) in modules.items():
            memory = engine_memory(module, trained_by, run.device)
            leaked = leaked_parameters(module)
            figures["leaked"] += len(leaked)
            self._warn_of_leaks(run, name, leaked)
            parts = ("parameters", "gathered") if trained_by is None else memory._fields
            figures.update({f"{part}_gib/{name}": getattr(memory, part) / GIB for part in parts})
        return figures

    def _warn_of_leaks(self, run: Run, engine: str, leaked: list[str]) -> None:
        if leaked and engine not in self._warned_of:
            self._warned_of.add(engine)
            logger.warning(
                "step %d: %d parameters of %s are still gathered after the step and keep their memory: %s%s. The "
                "metric memory/leaked_parameters counts them from now on",
                *(run.step, len(leaked), engine, ", ".join(leaked[:5]), " and others" if len(leaked) > 5 else ""),
            )

    def _flops(self, run: Run, batch: StepBatch) -> list[int]:
        """Operations of each micro-batch of this rank, computed from sequence lengths on the host."""
        return [
            count_flops(
                micro.batch,
                run.spec,
                run.decoders[micro.decoder_idx].module.sizes,
                self.encoder.trained_parts,
                micro.decoder_idx,
            ).total
            for micro in batch.micro_batches
        ]

    def _speed(self, run: Run, totals: Totals, elapsed: float) -> dict[str, float]:
        peak = self.peak_flops
        paused_s = {work: totals.largest[f"{work}_s"] for work in (SAVE, VALIDATION, EVALUATION)}
        mfu = {} if peak is None else {"train/mfu": totals.flops / (elapsed * dist.world_size() * peak)}
        return mfu | {
            **{
                f"speed/{name}_per_s": totals.sums[name] / elapsed
                for name in ("encoder_tokens", "decoder_rows", "labels")
            },
            "speed/tflops_per_s": totals.flops / elapsed / 1e12,
            "speed/step_s": elapsed / totals.num_steps,
            "speed/data_wait_share": totals.waited_s / elapsed,
            "speed/data_wait_s": totals.waited_s / totals.num_steps,
            **{f"speed/{work}_share": paused_s[work] / (elapsed + sum(paused_s.values())) for work in paused_s},
            "train/skipped_steps": float(run.skipped_steps),
            **({} if run.spikes is None else {"train/spikes": float(run.spikes.num_skipped)}),
        }

    def _report(self, run: Run, metrics: dict[str, float], step_s: float) -> None:
        loss, tokens = metrics["train/loss"], metrics["speed/encoder_tokens_per_s"]
        if not self._bar.disable:
            self._bar.set_postfix_str(f"loss {loss:.3f}, {tokens:,.0f} encoder tokens/s")
            return
        remaining = timedelta(seconds=int((run.total_steps - run.step) * step_s))
        logger.info(
            "step %d of %d: loss %.4f, gradient norm %.2f, %s encoder tokens/s, %.2f s/step, peak memory %.2f GiB, "
            "network %.1f MiB/step, %s left",
            *(run.step, run.total_steps, loss, metrics["train/grad_norm"], f"{tokens:,.0f}", step_s),
            *(metrics["memory/peak_gib"], metrics.get("network/sent_mib", 0.0), remaining),
        )


@dataclass(kw_only=True)
class PeriodicHook(Hook):
    """Work every `every` steps and at the end of the run (0: only at the end), once for each due step.

    After a stop request there may be little time left to save. The hook then aborts or skips its work, and the next
    start of the run catches up on it.

    phase: the work, in the words of `system.activity` and of a pause.
    seconds_key: metric of its time.
    log: logs the metrics of a step.
    done: last step whose work is done, also of an earlier start of the run; None if there is none.
    alive: called before each batch to reset the watchdog.
    is_stopped: whether this rank has received a stop request.
    """

    phase: ClassVar[str]
    seconds_key: ClassVar[str]
    log: LogMetrics
    every: int
    done: int | None
    alive: Callable[[], None]
    is_stopped: Callable[[], bool]

    def on_start(self, run: Run) -> None:
        if self.every and run.step % self.every == 0 and self.done != run.step:
            self._work(run)

    def after_step(self, run: Run, batch: StepBatch, result: StepResult) -> None:
        if self.every and run.step % self.every == 0 and not result.notices.ends_run:
            self._work(run)

    def on_end(self, run: Run) -> None:
        if run.step == run.total_steps and self.done != run.step and not run.is_stopping:
            self._work(run)

    def is_wanted(self, run: Run) -> bool:
        """Whether the run has this work."""
        raise NotImplementedError

    def measure(self, run: Run) -> dict[str, float]:
        """Do the work of the current step, and return its metrics. Collective."""
        raise NotImplementedError

    def before_pass(self) -> bool:
        """Reset the watchdog. Returns whether this rank has received a stop request."""
        self.alive()
        return self.is_stopped()

    def _work(self, run: Run) -> None:
        if not self.is_wanted(run):
            return
        with run.pause(self.phase):  # flushes earlier steps, so step numbers in the log never decrease
            started = time.perf_counter()
            activity.note("starting", phase=self.phase)
            try:
                metrics = self.measure(run)
            except (ValidationStopped, EvaluationStopped):
                logger.info("step %d: %s aborted; the next start of the run catches up on it", run.step, self.phase)
                run.is_stopping = True
                return
            finally:
                activity.note(f"after {self.phase}", phase="")
            # Forward passes keep up to `stage3_max_reuse_distance` parameters gathered for a backward pass.
            for engine in (run.engine, *run.decoder_engines.values()):
                engine.empty_partition_cache()
            self.done = run.step
            self.log(run.step, {self.seconds_key: time.perf_counter() - started, **metrics})


@dataclass(kw_only=True)
class ValidationHook(PeriodicHook):
    """Validates and logs the scores."""

    priority = 40
    phase, seconds_key = VALIDATION, VALIDATION_KEY

    def is_wanted(self, run: Run) -> bool:
        return run.validator is not None

    def measure(self, run: Run) -> dict[str, float]:
        assert run.validator is not None
        scores, num_samples = self._scores(run, run.validator), run.validator.num_samples_of_tasks
        metrics: dict[str, float] = {}
        for decoder, by_task, counts in zip(run.decoder_names, scores, num_samples, strict=True):
            for task, score in by_task.items():
                metrics.update(score.as_metrics(f"validation/{decoder}/{task}"))
                metrics[f"validation/{decoder}/{task}/num_samples"] = counts[task]
                logger.info("step %d, %s, %s: %s", run.step, decoder, task, score)
        return metrics

    def _scores(self, run: Run, validator: Validator) -> list[dict[str, TaskScores]]:
        tasks, names = ", ".join(validator.tasks), ", ".join(run.decoder_names)
        logger.info("step %d: validating %d samples of %s for %s", run.step, validator.num_samples, tasks, names)
        with _progress_bar("validate", validator.num_forwards, leave=False) as bar:

            def before_forward() -> bool:
                bar.update()
                return self.before_pass()

            return validator.run(run.engine, run.decoders, before_forward)


@dataclass(kw_only=True)
class EvaluationHook(PeriodicHook):
    """Answers the questions of `Run.evaluator` with the current weights and logs the scores."""

    priority = 45
    phase, seconds_key = EVALUATION, EVALUATION_KEY

    def is_wanted(self, run: Run) -> bool:
        return run.evaluator is not None

    def measure(self, run: Run) -> dict[str, float]:
        assert run.evaluator is not None
        metrics = run.evaluator.run(run, self.before_pass)
        for name, value in metrics.items():
            logger.info("step %d, %s: %.4f", run.step, name, value)
        return metrics


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
        with run.pause(SAVE):
            activity.note(activity.SAVING)
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


def _memory_metrics(totals: Totals) -> dict[str, float]:
    """Maxima over the ranks."""
    return {
        "memory/peak_gib": totals.peak_bytes / GIB,
        "memory/peak_rank": float(totals.peak_rank),
        "memory/leaked_parameters": totals.largest["leaked"],
        **{f"memory/{name}": value for name, value in totals.largest.items() if "_gib/" in name},
    }


def _network_metrics(by_kind: Mapping[Collective, int], num_steps: int, elapsed: float) -> dict[str, float]:
    """Means per step of this rank's collectives: bytes of full tensors by kind and engine, and bytes that it sends."""
    full, sent = Counter[str](), 0.0
    for kind, full_bytes in by_kind.items():
        if kind.num_ranks == 1:
            continue
        full[f"network/{kind.op}_mib/{kind.engine}"] += full_bytes
        sent += sent_bytes(kind, full_bytes)
    if not full:
        return {}
    return {
        **{name: size / _MIB / num_steps for name, size in full.items()},
        "network/sent_mib": sent / _MIB / num_steps,
        "network/sent_mib_per_s": sent / _MIB / elapsed,
    }


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

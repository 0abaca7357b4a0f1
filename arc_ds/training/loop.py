"""The training loop. It reads as the algorithm; everything periodic is a hook (`hooks.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from arc_ds.data.loading.step_batch import StepBatch
from arc_ds.data.loading.workers import BatchLoader
from arc_ds.errors import ArcError
from arc_ds.launch.exit_codes import EXIT_OK, EXIT_PREEMPTED
from arc_ds.launch.signals import StopRequest
from arc_ds.system import activity, dist
from arc_ds.training.hooks import Hook
from arc_ds.training.run import DataClock, Run
from arc_ds.training.step import Notice, train_step


def fit(run: Run, hooks: Sequence[Hook], stop: StopRequest) -> int:
    """Train from `run.step` to the last step and return the exit code. Collective.

    If a signal requested the stop, the exit code is EXIT_PREEMPTED and the hooks have saved a checkpoint to resume
    from. If a rank cannot build its next batch (DataError), all ranks save, stop before that step and raise the same
    error. A TrainingError raised by a hook ends the run.
    """
    hooks = sorted(hooks, key=lambda hook: hook.priority)
    for hook in hooks:
        hook.on_start(run)
    with run.batches(stop) as loader:
        ahead = LookAhead(loader, run.clock)
        for batch in () if run.is_stopping else ahead:
            result = train_step(
                run.engine,
                run.decoders,
                batch,
                schedule=run.schedule,
                tasks=run.data.tasks,
                normalize=run.normalize,
                notice=Notice(stop=stop.is_set(), failed=ahead.error is not None, num_splits=ahead.num_splits),
                spikes=run.spikes,
            )
            run.count_step(applied=result.applied)
            for hook in hooks:
                hook.after_step(run, batch, result)
            if result.notices.ends_run or run.is_stopping:
                break
            ahead.agree(result.notices.splits)
    stop.answer()
    activity.note("closing")
    for hook in hooks:
        hook.on_end(run)
    dist.raise_together(ahead.error)
    return EXIT_PREEMPTED if run.step < run.total_steps or run.is_stopping else EXIT_OK


class LookAhead:
    """Iterates over this rank's batches, one batch ahead.

    It yields a batch only after it has fetched the next one or found that there is none. The rank can then announce its
    next batch to the other ranks in the current step (`step.Notice`). A rank without a batch could not take part in the
    next step, and a rank with more micro-batches than the others would block in the surplus ones.

    error: the reason why there is no next batch. None if there is one, after a stop, and at the end of the run.
    """

    def __init__(self, loader: BatchLoader, clock: DataClock) -> None:
        """clock: records the waiting time."""
        self.error: ArcError | None = None
        self._loader = loader
        self._clock = clock
        self._next: StepBatch | None = None

    @property
    def num_splits(self) -> int:
        """Micro-batches per decoder in this rank's next batch; 0 if there is no next batch."""
        return 0 if self._next is None else self._next.num_splits

    def agree(self, splits: Sequence[int]) -> None:
        """Repack the next batch to the largest `num_splits` of all ranks."""
        if self._next is not None and self.num_splits < max(splits):
            with self._clock.waiting(remade=1):
                self._next = self._loader.repack(self._next, max(splits))

    def __iter__(self) -> Iterator[StepBatch]:
        """Yield all batches before the error. Collective.

        If a rank cannot build its first batch, all ranks raise that error. If a stop was requested before a rank had
        its first batch, no rank yields anything.
        """
        self._next = self._fetch()
        dist.raise_together(self.error)
        splits = dist.gather_objects(self.num_splits)
        if 0 in splits:
            return
        self.agree(splits)
        while (batch := self._next) is not None:
            self._next = self._fetch()
            yield batch

    def _fetch(self) -> StepBatch | None:
        activity.note("waiting for data")
        try:
            with self._clock.waiting():
                return next(self._loader, None)
        except ArcError as error:
            self.error = error
            return None

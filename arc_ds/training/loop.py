"""The training loop. It reads as the algorithm; everything periodic is a hook (`hooks.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from arc_ds.data.loading.step_batch import StepBatch
from arc_ds.errors import ArcError
from arc_ds.launch.exit_codes import EXIT_OK, EXIT_PREEMPTED
from arc_ds.launch.signals import StopRequest
from arc_ds.system import dist
from arc_ds.training.hooks import Hook
from arc_ds.training.run import Run
from arc_ds.training.step import Notice, train_step


def fit(run: Run, hooks: Sequence[Hook], stop: StopRequest) -> int:
    """Trains from `run.step` to the last step; returns the exit code. A collective.

    EXIT_PREEMPTED where a signal asked for the stop: hooks have then saved what the next start goes on from. A rank
    that cannot make its next batch (DataError) stops all ranks before that step, saved likewise, with one error. What
    a hook raises (TrainingError) ends the run.
    """
    hooks = sorted(hooks, key=lambda hook: hook.priority)
    for hook in hooks:
        hook.on_start(run)
    ahead = LookAhead(run.batches(stop), run.make_again)
    for batch in () if run.is_stopping else ahead:
        result = train_step(
            run.engine,
            run.decoders,
            batch,
            schedule=run.schedule,
            tasks=run.tasks,
            normalize=run.config.loss.normalize,
            notice=Notice(stop=stop.received is not None, failed=ahead.error is not None, num_splits=ahead.num_splits),
        )
        run.count_step(applied=result.applied)
        for hook in hooks:
            hook.after_step(run, batch, result)
        if result.agreed.ends_run or run.is_stopping:
            break
        ahead.agree(result.agreed.splits)
    for hook in hooks:
        hook.on_end(run)
    dist.raise_together(ahead.error)
    return EXIT_PREEMPTED if run.step < run.config.steps or run.is_stopping else EXIT_OK


class LookAhead:
    """This rank's batches, each handed out when the next one is here, or known not to come.

    What a rank knows of its next batch it can still tell the others in time (`step.Notice`): without a batch it could
    not take part in the step, and with more micro-batches than the others it would be left waiting in the last ones.

    error: why there is no next batch; None where there is one, at a stop, and at the end of the run.
    """

    def __init__(self, batches: Iterator[StepBatch], make_again: Callable[[StepBatch, int], StepBatch]) -> None:
        """make_again: a batch's samples in a larger number of micro-batches for each decoder."""
        self.error: ArcError | None = None
        self._batches = batches
        self._make_again = make_again
        self._next: StepBatch | None = None

    @property
    def num_splits(self) -> int:
        """Micro-batches for each decoder in this rank's next batch; 0 where there is none."""
        return 0 if self._next is None else self._next.num_splits

    def agree(self, splits: Sequence[int]) -> None:
        """Bring the next batch to the largest of all ranks' `num_splits`."""
        if self._next is not None and self.num_splits < max(splits):
            self._next = self._make_again(self._next, max(splits))

    def __iter__(self) -> Iterator[StepBatch]:
        """All batches before the error. Where the first one cannot be made, all ranks raise that; a collective.

        None where a rank was asked to stop before it had the first.
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
        try:
            return next(self._batches, None)
        except ArcError as error:
            self.error = error
            return None

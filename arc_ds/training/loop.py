"""The training loop. It reads as the algorithm; everything periodic is a hook (`hooks.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from arc_ds import dist
from arc_ds.errors import ArcError
from arc_ds.training.exit_codes import EXIT_OK, EXIT_PREEMPTED
from arc_ds.training.hooks import Hook
from arc_ds.training.run import Run
from arc_ds.training.signals import StopRequest
from arc_ds.training.step import Notice, train_step

Batch = TypeVar("Batch")


def fit(run: Run, hooks: Sequence[Hook], stop: StopRequest) -> int:
    """Trains from `run.step` to the last step; returns the exit code. A collective.

    EXIT_PREEMPTED where a signal asked for the stop: hooks have then saved what the next start goes on from. A rank
    that cannot make its next batch (DataError) stops all ranks before that step, saved likewise, with one error. What
    a hook raises (TrainingError) ends the run.
    """
    for hook in hooks:
        hook.on_start(run)
    ahead = LookAhead(run.batches())
    for batch in ahead:
        result = train_step(
            run.engine,
            run.decoders,
            batch,
            schedule=run.schedule,
            tasks=run.tasks,
            normalize=run.config.loss.normalize,
            notice=Notice(stop=stop.received is not None, failed=ahead.error is not None),
        )
        run.count_step(applied=result.applied)
        for hook in hooks:
            hook.after_step(run, batch, result)
        if run.step < run.config.steps and result.agreed.ends_run:
            for hook in hooks:
                hook.on_end(run)
            dist.raise_together(ahead.error)
            return EXIT_PREEMPTED
    for hook in hooks:
        hook.on_end(run)
    return EXIT_OK


class LookAhead(Generic[Batch]):
    """This rank's batches, each handed out when the next one is here, or known not to come.

    A rank without a batch cannot take part in a step, and the others would wait for it in the step's first collective.
    One step earlier it can still tell them (`step.Notice`).

    error: why there is no next batch; None where there is one, and at the end of the run.
    """

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.error: ArcError | None = None
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        """All batches before the error. Where the first one cannot be made, all ranks raise that; a collective."""
        batch = self._fetch()
        dist.raise_together(self.error)
        while batch is not None:
            following = self._fetch()
            yield batch
            batch = following

    def _fetch(self) -> Batch | None:
        try:
            return next(self._batches, None)
        except ArcError as error:
            self.error = error
            return None

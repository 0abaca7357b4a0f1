"""The training loop. It reads as the algorithm; everything periodic is a hook (`hooks.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from arc_ds.training.exit_codes import EXIT_OK, EXIT_PREEMPTED
from arc_ds.training.hooks import Hook
from arc_ds.training.run import Run
from arc_ds.training.signals import StopRequest
from arc_ds.training.step import train_step


def fit(run: Run, hooks: Sequence[Hook], stop: StopRequest) -> int:
    """Trains from `run.step` to the last step; returns the exit code. A collective.

    EXIT_PREEMPTED where a signal asked for the stop: hooks have then saved what the next start goes on from.
    What a hook raises (TrainingError) ends the run.
    """
    for hook in hooks:
        hook.on_start(run)
    for batch in run.batches():
        result = train_step(
            run.engine,
            run.decoders[batch.decoder_idx],
            batch,
            schedule=run.schedule,
            tasks=run.tasks,
            normalize=run.config.loss.normalize,
        )
        run.count_step(applied=result.applied)
        for hook in hooks:
            hook.after_step(run, batch, result)
        if run.step < run.config.steps and stop.agreed(run.device):
            for hook in hooks:
                hook.on_end(run)
            return EXIT_PREEMPTED
    for hook in hooks:
        hook.on_end(run)
    return EXIT_OK

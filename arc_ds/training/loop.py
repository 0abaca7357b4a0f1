"""The training loop. It reads as the algorithm; everything periodic is a hook (`hooks.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from arc_ds.errors import TrainingError
from arc_ds.training.exit_codes import EXIT_OK, EXIT_PREEMPTED
from arc_ds.training.hooks import Hook
from arc_ds.training.run import Run
from arc_ds.training.signals import StopRequest
from arc_ds.training.step import StepResult, train_step


def fit(run: Run, hooks: Sequence[Hook], stop: StopRequest) -> int:
    """Trains from `run.step` to the last step; returns the exit code. A collective.

    EXIT_PREEMPTED where a signal asked for the stop: hooks have then saved what the next start goes on from.
    TrainingError where more steps in a row than the config allows had a non-finite loss or gradient.
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
        run.step += 1
        _check_applied(run, result)
        for hook in hooks:
            hook.after_step(run, batch, result)
        if run.step < run.config.steps and stop.agreed():
            for hook in hooks:
                hook.on_end(run)
            return EXIT_PREEMPTED
    for hook in hooks:
        hook.on_end(run)
    return EXIT_OK


def _check_applied(run: Run, result: StepResult) -> None:
    run.skipped_in_row = 0 if result.applied else run.skipped_in_row + 1
    limit = run.config.optimizer.max_skipped_steps
    if run.skipped_in_row > limit:
        raise TrainingError(
            f"{run.skipped_in_row} steps in a row, up to step {run.step}, had a loss or gradient that is not finite; "
            f"the limit is optimizer.max_skipped_steps = {limit}. Lower the learning rates, or resume from an earlier "
            "checkpoint with another seed."
        )

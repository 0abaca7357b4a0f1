"""Stage "program": `arc-ds train` as a user starts it, stopped and resumed, against a run without a stop.

A small random model with two decoders, bf16 on the GPU. The kernels add nothing up by atomics, so both runs should give
the same losses to the last bit; the row says by how much they differ.
"""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from gpu_stages.context import ROOT, StageContext, one_line

NUM_STEPS, STOP_AFTER = 150, 10
REHEARSED_STEPS, REHEARSED_STOP = 6, 2

EXIT_PREEMPTED = 75  # `arc_ds.launch.exit_codes`, as users see it
BF16_NOISE = 2.0**-8
"""Relative: half a unit in the last place of bfloat16. Equal steps in another order of sums differ by about so much."""


def run(context: StageContext) -> None:
    """Append whether the program trains, stops and resumes, and the difference of the losses."""
    if not find_spec("deepspeed"):
        context.result("arc-ds train", "left out", "deepspeed is not installed; carry its wheel (tools/gpu_day.md)")
        return
    from tests.helpers.tiny_run import losses, write_inputs

    with tempfile.TemporaryDirectory(prefix="gpu_day_", ignore_cleanup_errors=True) as folder:
        config = write_inputs(Path(folder))
        whole, stopped = Path(folder, "whole"), Path(folder, "stopped")
        with _training(context, config, whole) as other:
            try:
                _stop_and_resume(context, config, stopped)
            finally:  # however the stopped run ends, this one shows whether the program trains
                _end(context, other, "uninterrupted run", 0)
        _compare(context, losses(whole), losses(stopped))


@contextmanager
def _training(
    context: StageContext, config: Path, run_dir: Path, hold_after: int | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A run of `arc-ds train`, killed at the end of the context if it is still there.

    hold_after: the step after which it waits for the stop signal.
    """
    from tests.helpers.tiny_run import start_training

    overrides = [f"run_dir={run_dir}", f"steps={REHEARSED_STEPS if context.rehearse else NUM_STEPS}"]
    overrides += ["checkpoint.every=0", "validation.every=0", "data.validation=null", "tracking.mlflow=false"]
    if context.rehearse:
        overrides += ["optimizer.warmup_steps=1"]
    else:
        overrides += ["device=cuda", "precision=bf16", f"deepspeed={ROOT / 'ds_configs' / 'zero3.json'}"]
    process = start_training(config, overrides, hold_after=hold_after)
    try:
        yield process
    finally:
        process.kill()


def _stop_and_resume(context: StageContext, config: Path, run_dir: Path) -> None:
    from tests.helpers.tiny_run import last_logged_step

    wanted = REHEARSED_STOP if context.rehearse else STOP_AFTER
    with _training(context, config, run_dir, hold_after=wanted) as first:
        while first.poll() is None and last_logged_step(run_dir) < wanted:
            if context.seconds_left() < 0:
                raise TimeoutError(f"no step {wanted} before the time was up")
            time.sleep(0.02)
        first.send_signal(signal.SIGTERM)
        _end(context, first, "stopped run", EXIT_PREEMPTED)
    context.result("stopped at step", str(last_logged_step(run_dir)))
    with _training(context, config, run_dir) as again:
        _end(context, again, "resumed run", 0)


def _end(context: StageContext, process: subprocess.Popen[str], name: str, wanted: int) -> None:
    """Wait for a run; RuntimeError with its last words if it ends with another code."""
    console, _ = process.communicate(timeout=max(1.0, context.seconds_left()))
    if process.returncode != wanted:
        print(console)
        raise RuntimeError(f"{name}: exit code {process.returncode}, expected {wanted}: {one_line(console[-300:])}")
    context.result(name, f"exit code {process.returncode}")


def _compare(context: StageContext, whole: list[float], stopped: list[float]) -> None:
    if len(whole) != len(stopped) or len(set(whole)) < 2:
        raise RuntimeError(f"the runs have {len(whole)} and {len(stopped)} losses; expected as many, and changing ones")
    apart = max(abs(a - b) / abs(a) for a, b in zip(whole, stopped, strict=True))
    word = "bit-equal" if apart == 0 else "within bf16 noise" if apart <= BF16_NOISE else "different"
    note = f"{word}; {len(whole)} steps, loss {whole[0]:.4f} to {whole[-1]:.4f}"
    metric = "largest relative difference of a loss"
    context.add("arc-ds train", metric, apart, variant="stopped and resumed", note=note)
    context.result("losses", word)

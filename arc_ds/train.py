"""One rank of a training run: parse, build, fit, close.

A launcher starts it:

    arc-ds train CONFIG.yaml [key.path=value ...]
    deepspeed --hostfile hosts --module arc_ds.train CONFIG.yaml [key.path=value ...]
"""

from __future__ import annotations

import os

from arc_ds.launch.parents import stop_with_launchers
from arc_ds.launch.signals import StopRequest, hold_stop_signals

if __name__ == "__main__":
    # The imports below take seconds. A stop signal from the launcher during that time must be deferred, not kill us.
    hold_stop_signals()
    if "RANK" in os.environ:
        stop_with_launchers()

import logging
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from arc_ds.config.load import load_config
from arc_ds.config.schema import RunConfig
from arc_ds.config.validate import check_paths
from arc_ds.errors import ArcError, ConfigError
from arc_ds.launch import heartbeat
from arc_ds.launch.exit_codes import EXIT_OK, EXIT_PREEMPTED
from arc_ds.launch.failures import report
from arc_ds.launch.heartbeat import beating
from arc_ds.launch.start import stoppable
from arc_ds.launch.status import exit_at_once
from arc_ds.planning.sizes import check_tasks
from arc_ds.shards.mappings import raise_descriptor_limit
from arc_ds.system import activity, dist
from arc_ds.system.device import describe_device, peak_bf16_flops, select_device
from arc_ds.tracking.uris import check_uri
from arc_ds.training.build import build_run
from arc_ds.training.collectives import CollectiveCounter, counting_collectives
from arc_ds.training.frozen_guard import FrozenGuard
from arc_ds.training.hooks import (
    EVALUATION_KEY,
    VALIDATION_KEY,
    CheckpointHook,
    EvaluationHook,
    Hook,
    MetricsHook,
    ValidationHook,
    WatchdogHook,
)
from arc_ds.training.loop import fit
from arc_ds.training.non_finite import NonFiniteHook
from arc_ds.training.out_of_memory import explaining_memory
from arc_ds.training.run import Run
from arc_ds.training.run_folder import RunFolder, check_run_folder, lock_run_folder
from arc_ds.training.spikes import SpikeGuard
from arc_ds.training.watchdog import Watchdog, note_modules
from arc_kernels import use_attention

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Train with the arguments `CONFIG.yaml [key.path=value ...]`; return the exit code (`launch.exit_codes`)."""
    hold_stop_signals()
    raise_descriptor_limit()
    dist.setup_logging()
    config = _parse(argv)
    device = select_device(config.device, dist.local_rank())
    check_attention(config.attention_backend, device)
    _join(device, config)
    with beating(config.distributed.timeout_s), ExitStack() as lock:
        with stoppable("reading weights and data"):
            activity.note("reading weights and data")
            # The heartbeat finds lost ranks from here on. Others may wait for this one as long as it reads.
            dist.limit_collectives(config.stall_limit_s + config.distributed.timeout_s)
            with dist.fail_together():
                check_tasks(config)
                check_paths(config)
                if dist.is_main():
                    lock.enter_context(lock_run_folder(config))
                check_run_folder(config)
                if dist.is_main() and config.tracking.mlflow:
                    check_uri(Path(config.run_dir), config.tracking.uri)
            with explaining_memory(config):
                run = build_run(config, device)
        code = train(config, run)
        if code == EXIT_PREEMPTED:
            logger.info("stopped and saved at step %d as requested; the same command resumes from there", run.step)
        # DeepSpeed's launcher kills all ranks when one exits with a nonzero code. Wait: rank 0 may still send metrics.
        dist.barrier()
    dist.close_distributed()
    return code


def _join(device: torch.device, config: RunConfig) -> None:
    """Join the other ranks. Each host says whom it waits for."""
    waiting = f"waiting for all {dist.world_size()} ranks at {dist.meeting_point()}, as {dist.rank_in_words()}"
    if dist.world_size() > 1 and dist.local_rank() == 0:
        logger.log(logging.INFO if dist.is_main() else logging.WARNING, "%s", waiting)
    with stoppable(waiting, logging.WARNING):
        dist.init_distributed(device, config.distributed.timeout_s)


def check_attention(backend: str, device: torch.device) -> None:
    """Raise ConfigError if the config requires Triton attention on a device that cannot run it."""
    if backend == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            "attention_backend is triton, but the run is on the CPU. Set attention_backend=auto (or reference), or run "
            "on a GPU."
        )


def train(config: RunConfig, run: Run, more_hooks: Sequence[Hook] = ()) -> int:
    """Resume the run from its folder and train it to its end or to a stop; return the exit code. Collective."""
    note_modules(run)
    if config.optimizer.skip_spikes is not None:
        run.spikes = SpikeGuard(config.optimizer.skip_spikes)
        run.spikes.attach(run.engine)
    dist.limit_collectives(config.stall_limit_s + config.distributed.timeout_s)
    activity.note("reading the checkpoint")
    with stoppable("reading the checkpoint"):
        folder = RunFolder(config, run)
    dist.barrier()  # no rank may end in `stoppable` while another one trains
    status = "FAILED"
    try:
        with StopRequest() as stop:
            watchdog = Watchdog(
                run.folder,
                rank=dist.rank(),
                limit_s=config.stall_limit_s,
                stop_grace_s=config.distributed.timeout_s,
                heartbeat=heartbeat.current(),
                stop=stop,
            )
            logger.info("%s", _in_words(run))
            with (
                watchdog,
                use_attention(config.attention_backend),
                explaining_memory(config, run),
                counting_collectives(run.decoder_engines) as counter,
            ):
                code = fit(run, [*_make_hooks(config, run, folder, watchdog, stop, counter), *more_hooks], stop)
        status = "FINISHED" if code == EXIT_OK else "KILLED"
    finally:
        folder.close(status)
    return code


def _make_hooks(
    config: RunConfig,
    run: Run,
    folder: RunFolder,
    watchdog: Watchdog,
    stop: StopRequest,
    counter: CollectiveCounter,
) -> list[Hook]:
    """The hooks of a run. Collective."""
    return [
        WatchdogHook(watchdog),
        MetricsHook(
            log=folder.log,
            every=config.log_every,
            encoder=config.encoder,
            peak_flops=peak_bf16_flops(run.device) if config.precision == "bf16" else None,
            counter=counter,
        ),
        NonFiniteHook(max_skipped_steps=config.optimizer.max_skipped_steps),
        FrozenGuard(),
        CheckpointHook(
            save=folder.save,
            finish=folder.finish,
            has_failed=lambda: folder.has_failed_save,
            request_stop=stop.set,
            every=config.checkpoint.every,
        ),
        ValidationHook(
            log=folder.log,
            every=config.validation.every,
            done=folder.last_logged(VALIDATION_KEY),
            alive=watchdog.alive,
            is_stopped=stop.is_set,
        ),
        EvaluationHook(
            log=folder.log,
            every=0 if config.evaluation is None else config.evaluation.every,
            done=None if config.evaluation is None else folder.last_logged(EVALUATION_KEY),
            alive=watchdog.alive,
            is_stopped=stop.is_set,
        ),
    ]


def _parse(argv: Sequence[str]) -> RunConfig:
    # A launcher may add its own option. Our arguments are a path and overrides.
    words = [word for word in argv if not word.startswith("--local_rank")]
    if not words:
        raise ConfigError("no config given. Usage: arc_ds.train CONFIG.yaml [key.path=value ...]")
    return load_config(words[0], words[1:])


def _in_words(run: Run) -> str:
    """Console message at the start of the run."""
    trained = sum(param.ds_numel for param in run.engine.module.parameters() if param.requires_grad)
    if run.step >= run.total_steps:
        return f"{run.folder}: all {run.total_steps} steps are done"
    return (
        f"{run.folder}: steps {run.step + 1} to {run.total_steps} on {dist.world_size()} rank(s) of "
        f"{describe_device(run.device)}; {trained:,} parameters trained for {', '.join(run.decoder_names)}"
    )


def _as_rank(argv: Sequence[str]) -> int:
    """`main` for external launchers: report an error as an exit code and a message, which each host prints once."""
    try:
        return main(argv)
    except BaseException as error:
        code, message = report(error)
        if dist.local_rank() == 0 or not (isinstance(error, ArcError) and error.is_of_all_ranks):
            logger.error("%s", message)
        return code


if __name__ == "__main__":
    code = _as_rank(sys.argv[1:])
    sys.exit(code) if code in (EXIT_OK, EXIT_PREEMPTED) else exit_at_once(code)

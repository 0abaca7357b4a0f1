"""One rank of a training run: parse, build, fit, close. Started by a launcher:

    arc-ds train CONFIG.yaml [key.path=value ...]
    deepspeed --hostfile hosts --module arc_ds.train CONFIG.yaml [key.path=value ...]
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from arc_ds import dist
from arc_ds.config.load import load_config
from arc_ds.device import select_device
from arc_ds.training.build import build_run
from arc_ds.training.exit_codes import EXIT_OK
from arc_ds.training.hooks import CheckpointHook, Hook, MetricsHook, ValidationHook, WatchdogHook
from arc_ds.training.loop import fit
from arc_ds.training.run_folder import RunFolder, check_run_folder
from arc_ds.training.signals import StopRequest
from arc_ds.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """`CONFIG.yaml [key.path=value ...]` → exit code of this rank (`training.exit_codes`)."""
    # A launcher may add an option of its own; ours are a path and overrides.
    words = [word for word in argv if not word.startswith("--local_rank")]
    dist.setup_logging()
    config = load_config(words[0], words[1:])
    device = select_device(config.device, dist.local_rank())
    dist.init_distributed(device)
    with dist.fail_together():
        check_run_folder(config)
    run = build_run(config, device)
    folder = RunFolder.open(run)
    metrics = MetricsHook(folder.log, show_progress=sys.stderr.isatty())
    status = "FAILED"
    try:
        with StopRequest() as stop, Watchdog(run.folder, rank=dist.rank(), limit_s=config.stall_limit_s) as watchdog:
            hooks: list[Hook] = [
                WatchdogHook(watchdog),
                metrics,
                ValidationHook(folder.log, metrics, every=config.validation.every),
                CheckpointHook(folder.save, metrics, every=config.checkpoint.every),
            ]
            code = fit(run, hooks, stop)
        status = "FINISHED" if code == EXIT_OK else "KILLED"
    finally:
        folder.close(status)
    dist.close_distributed()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""`arc-ds train` whose ranks wait after a step, so that a test can kill or stop them there at any speed.

HOLD_AFTER=STEP python -m tests.helpers.held_train train CONFIG.yaml ...
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from arc_ds.launch.signals import StopRequest


def main(argv: Sequence[str]) -> int:
    """One rank. It waits until it has received a stop signal or is killed, and leaves `held_by_PID` in the run."""
    from arc_ds import train
    from arc_ds.training.hooks import Hook

    @dataclass
    class Hold(Hook):
        stop: StopRequest

        def after_step(self, run: Any, batch: Any, result: Any) -> None:
            if run.step != int(os.environ["HOLD_AFTER"]):
                return
            (run.folder / f"held_by_{os.getpid()}").touch()
            while not self.stop.is_set():
                time.sleep(0.01)

    fit = train.fit
    train.fit = lambda run, hooks, stop: fit(run, [*hooks, Hold(stop)], stop)
    return train.main(argv)


if __name__ == "__main__":
    from arc_ds import cli
    from arc_ds.commands import train as command

    command.TRAIN_MODULE = "tests.helpers.held_train"
    sys.exit(cli.main(sys.argv[1:]))

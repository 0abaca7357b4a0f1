"""Learning rates as pure functions of the step; a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RateSchedule:
    """The shape of a learning rate over a run. Each parameter group has its own peak.

    one_cycle: cosine from `initial_lr` to the peak over the first `warmup_steps` steps (the last of them is at the
        peak), then cosine to `final_lr` at the last step.
    constant: the same warm-up, then the peak.

    The one_cycle schedule is torch's OneCycleLR as in the reference code, with two differences. The reference divides
    `final_lr` by peak / initial_lr, so its runs end far below `final_lr`. Its start and end rates also scale with the
    peak of each group. Here, `initial_lr` and `final_lr` are the actual rates at both ends.
    """

    total_steps: int
    warmup_steps: int
    initial_lr: float
    final_lr: float
    kind: Literal["one_cycle", "constant"] = "one_cycle"

    def lr(self, step: int, peak_lr: float) -> float:
        """Learning rate in `step` (0 to total_steps - 1) for a group with this peak; 0 for a peak of 0."""
        if peak_lr == 0:
            return 0.0
        peak_step = max(self.warmup_steps - 1, 0)
        if step < peak_step:
            return cosine(self.initial_lr, peak_lr, step / peak_step)
        if self.kind == "constant" or step == peak_step:
            return peak_lr
        return cosine(peak_lr, self.final_lr, (step - peak_step) / (self.total_steps - 1 - peak_step))


def cosine(start: float, end: float, progress: float) -> float:
    """Half a cosine wave from `start` (progress 0) to `end` (progress 1), exact at both ends."""
    weight = (1 - math.cos(math.pi * progress)) / 2
    return start * (1 - weight) + end * weight

"""Steps with a spike of the loss or of the gradient norm, which are skipped on all ranks (`optimizer.skip_spikes`)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arc_ds.config.schema import SkipSpikesConfig

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class SpikeGuard:
    """Compares loss and gradient norm of each step with their medians over earlier steps with the same decoders.

    The medians include skipped steps, so a lasting change of the level ends up as the new level. All ranks decide
    equally, because they compare sums over all ranks. The decision takes the place of DeepSpeed's check of the gradient
    norm, for which the host waits anyway.

    num_skipped: steps skipped since the run began.
    is_spike: whether the latest step was skipped as a spike.
    grad_norm: gradient norm of the latest step, also if it was skipped.
    """

    def __init__(self, config: SkipSpikesConfig) -> None:
        self.num_skipped = 0
        self.is_spike = False
        self.grad_norm = 0.0
        self._config = config
        self._loss: Tensor | None = None
        self._decoders = ""
        self._windows: dict[str, deque[tuple[float, float]]] = {}

    def attach(self, engine: DeepSpeedEngine) -> None:
        """Judge every step of the engine from now on. Call `prepare` before each."""
        optimizer: Any = engine.optimizer
        norm_groups = optimizer._get_norm_groups

        def judged() -> Sequence[float | Tensor]:
            # DeepSpeed skips a step with an infinite norm on all ranks.
            norms = self._read(norm_groups())
            return [math.inf] if self.is_spike else norms

        optimizer._get_norm_groups = judged

    def prepare(self, decoder_idxs: Collection[int], loss: Tensor) -> None:
        """loss: scalar on the device, of the global batch."""
        self._decoders, self._loss = ",".join(map(str, decoder_idxs)), loss

    def _read(self, norms: Sequence[float | Tensor]) -> Sequence[float | Tensor]:
        """Judge a step by its loss and the norms of its parameter groups. Return the same norms, on the host.

        One copy to the host for all of them. The conversion of float32 to float64 and back is exact.
        """
        assert self._loss is not None
        as_tensors = [torch.as_tensor(norm, dtype=torch.float64, device=self._loss.device) for norm in norms]
        *values, loss = torch.stack([*as_tensors, self._loss.double()]).tolist()
        is_valid = all(math.isfinite(value) and value >= 0 for value in values)  # DeepSpeed writes -1 for NaN
        self.grad_norm = math.hypot(*values) if is_valid else math.inf
        self.is_spike = self.judge(self._decoders, loss, self.grad_norm)
        self.num_skipped += self.is_spike
        return [
            torch.tensor(value, dtype=norm.dtype) if isinstance(norm, Tensor) else norm
            for value, norm in zip(values, norms, strict=True)
        ]

    def judge(self, decoders: str, loss: float, grad_norm: float) -> bool:
        """Whether a step is a spike. Records it for later ones unless it is not finite."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return False
        window = self._windows.setdefault(decoders, deque(maxlen=self._config.window))
        is_spike = 2 * len(window) >= self._config.window and (
            loss > self._config.loss * median(each for each, _ in window)
            or grad_norm > self._config.gradient_norm * median(each for _, each in window)
        )
        window.append((loss, grad_norm))
        return is_spike

    def to_json(self) -> dict[str, Any]:
        """The state for a checkpoint."""
        return {"num_skipped": self.num_skipped, "windows": {key: list(each) for key, each in self._windows.items()}}

    def load_json(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `to_json`. A checkpoint of a run without `skip_spikes` has none."""
        self.num_skipped = int(state.get("num_skipped", 0))
        for key, steps in state.get("windows", {}).items():
            self._windows[key] = deque(map(tuple, steps), maxlen=self._config.window)

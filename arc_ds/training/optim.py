"""AdamW with separate parameter groups for the encoder and for the bridge and markers of each decoder.

A step trains the encoder and the ports of its decoders; other ports must not change. AdamW, however, updates even
parameters with a zero gradient, through momentum and weight decay. `PortAdamW` therefore excludes the groups of other
ports from its step. Their weights, moments and step counts stay unchanged, as for `grad=None` in torch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from arc_ds.config.schema import OptimizerConfig
from arc_ds.errors import ConfigError
from arc_ds.model.compressor import Compressor, DecoderPort
from arc_ds.training.schedule import RateSchedule


@dataclass(frozen=True, kw_only=True)
class ParamGroup:
    """Parameters that share a learning rate.

    name: "encoder", "bridge.N", "markers.N" or "adapters.N" for decoder N, or "bridge" for one that all decoders share.
    port: index of the decoder whose steps train the group; None for all steps.
    peak_lr: learning rate at the schedule's peak.
    weight_decay: AdamW's decoupled decay.
    """

    name: str
    params: tuple[nn.Parameter, ...]
    port: int | None
    peak_lr: float
    weight_decay: float

    def is_active(self, decoder_idxs: Collection[int]) -> bool:
        """Whether a step with these decoders trains the group."""
        return self.port is None or self.port in decoder_idxs


def make_param_groups(compressor: Compressor, config: OptimizerConfig) -> tuple[ParamGroup, ...]:
    """Groups of all parameters that require a gradient. A part without such parameters has no group.

    Memory tokens belong to the encoder. Adapters of decoders have its rate. Raises ConfigError if nothing is trained.
    """
    parts: list[tuple[str, int | None, float, list[nn.Parameter]]] = [
        ("encoder", None, config.encoder_lr, list(compressor.encoder.parameters()))
    ]
    for port_idx, port in enumerate(cast(list[DecoderPort], list(compressor.ports))):
        bridge = list(port.bridge.parameters())
        markers = [marker for marker in (port.cont, port.rec) if marker is not None]
        parts.append((f"bridge.{port_idx}", port_idx, config.bridge_lr, bridge))
        parts.append((f"markers.{port_idx}", port_idx, config.markers_lr, markers))
        if port.adapters is not None:
            parts.append((f"adapters.{port_idx}", port_idx, config.encoder_lr, list(port.adapters.parameters())))
    if compressor.bridge is not None:
        parts.append(("bridge", None, config.bridge_lr, list(compressor.bridge.parameters())))
    groups = tuple(
        ParamGroup(name=name, params=trained, port=port_idx, peak_lr=peak_lr, weight_decay=config.weight_decay)
        for name, port_idx, peak_lr, params in parts
        if (trained := tuple(param for param in params if param.requires_grad))
    )
    if not groups:
        raise ConfigError(
            "nothing is trained: encoder, bridges and markers are all frozen or absent. "
            "Set encoder.trained_layers, encoder.train_embeddings or a bridge.kind other than none."
        )
    return groups


class PortAdamW(torch.optim.AdamW):
    """AdamW that skips the groups that the step's decoders do not train.

    ZeRO-3 updates its flat sub-groups one at a time: it puts one sub-group into its original group, empties all other
    groups and calls `step` (stage3.py, `_optimizer_step`). A group's "active" flag therefore covers all its sub-groups.

    fused: use one kernel per flat tensor; for parameters on a GPU.
    """

    def __init__(
        self, groups: Sequence[ParamGroup], *, betas: tuple[float, float], eps: float, fused: bool = False
    ) -> None:
        self.groups = tuple(groups)
        torch_groups = [
            {"params": list(group.params), "lr": group.peak_lr, "weight_decay": group.weight_decay, "active": True}
            for group in groups
        ]
        # Flat tensors are updated one at a time, so `foreach` has nothing to combine.
        super().__init__(torch_groups, betas=betas, eps=eps, foreach=False, fused=fused)

    def prepare(self, schedule: RateSchedule, step: int, decoder_idxs: Collection[int]) -> dict[str, float]:
        """Set learning rates and active groups for a step; return the rates of the active groups by name.

        All per-group values are set in every step, so a resumed run needs no optimizer hyperparameters from the
        checkpoint.
        """
        rates = {}
        for group, torch_group in zip(self.groups, self.param_groups, strict=True):
            torch_group["lr"] = schedule.lr(step, group.peak_lr)
            torch_group["weight_decay"] = group.weight_decay
            torch_group["active"] = group.is_active(decoder_idxs)
            if torch_group["active"]:
                rates[group.name] = torch_group["lr"]
        return rates

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Update the active groups with AdamW."""
        all_groups = self.param_groups
        self.param_groups = [group for group in all_groups if group["active"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = all_groups

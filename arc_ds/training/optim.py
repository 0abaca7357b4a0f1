"""AdamW over the compressor's groups: the encoder, and for each decoder its bridge and its markers.

A step trains the encoder and the ports of its decoders. The ports at rest must not move, but AdamW moves even a
parameter of zero gradient, by momentum and decay. So `PortAdamW` leaves the groups of other ports out of its step:
weights, moments and step counts stay as they are, as where torch finds `grad=None` (design 8.3).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from arc_ds.errors import ConfigError
from arc_ds.model.compressor import Compressor, DecoderPort
from arc_ds.training.schedule import RateSchedule


@dataclass(frozen=True, kw_only=True)
class ParamGroup:
    """Parameters that share a learning rate.

    name: "encoder", "bridge.N" or "markers.N" for decoder N. port: the decoder whose steps train the group, None for
    all steps. peak_lr: learning rate at the schedule's peak. weight_decay: AdamW's decoupled decay.
    """

    name: str
    params: tuple[nn.Parameter, ...]
    port: int | None
    peak_lr: float
    weight_decay: float

    def is_active(self, decoder_idxs: Collection[int]) -> bool:
        """Whether a step with these decoders trains the group."""
        return self.port is None or self.port in decoder_idxs


def make_param_groups(
    compressor: Compressor, *, encoder_lr: float, bridge_lr: float, markers_lr: float, weight_decay: float
) -> tuple[ParamGroup, ...]:
    """The groups of all parameters that require a gradient; a part without any has no group.

    Memory tokens belong to the encoder. ConfigError where nothing is trained.
    """
    parts: list[tuple[str, int | None, float, list[nn.Parameter]]] = [
        ("encoder", None, encoder_lr, list(compressor.encoder.parameters()))
    ]
    for port_idx, port in enumerate(cast(list[DecoderPort], list(compressor.ports))):
        bridge = list(port.bridge.parameters())
        markers = [marker for marker in (port.cont, port.rec) if marker is not None]
        parts.append((f"bridge.{port_idx}", port_idx, bridge_lr, bridge))
        parts.append((f"markers.{port_idx}", port_idx, markers_lr, markers))
    groups = []
    for name, owner, peak_lr, params in parts:
        trained = tuple(param for param in params if param.requires_grad)
        if trained:
            groups.append(ParamGroup(name=name, params=trained, port=owner, peak_lr=peak_lr, weight_decay=weight_decay))
    if not groups:
        raise ConfigError(
            "nothing is trained: encoder, bridges and markers are all frozen or absent. "
            "Set encoder.trained_layers, encoder.train_embeddings or a bridge.kind other than none."
        )
    return tuple(groups)


class PortAdamW(torch.optim.AdamW):
    """AdamW that leaves out the groups which the step's decoders do not train.

    ZeRO-3 steps its flat sub-groups one at a time: it puts one of them into the group that it was cut from, empties
    all others, and calls `step` (stage3.py, `_optimizer_step`). A group's flag thus holds for all of its sub-groups.
    fused: one kernel for each flat tensor; for parameters on a GPU.
    """

    def __init__(
        self, groups: Sequence[ParamGroup], *, betas: tuple[float, float], eps: float, fused: bool = False
    ) -> None:
        self.groups = tuple(groups)
        torch_groups = [
            {"params": list(group.params), "lr": group.peak_lr, "weight_decay": group.weight_decay, "active": True}
            for group in groups
        ]
        # The flat tensors come one at a time: there is nothing for `foreach` to join.
        super().__init__(torch_groups, betas=betas, eps=eps, foreach=False, fused=fused)

    def prepare(self, schedule: RateSchedule, step: int, decoder_idxs: Collection[int]) -> dict[str, float]:
        """Set rates and active groups for a step; returns the rates of the active groups by name.

        Everything that differs between groups is set in every step, so a resumed run needs nothing of the optimizer's
        hyperparameters in the checkpoint.
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
        """AdamW's step of the active groups."""
        all_groups = self.param_groups
        self.param_groups = [group for group in all_groups if group["active"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = all_groups

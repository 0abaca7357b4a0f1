"""Whole runs of the reference's training loop: losses, gradient norms and final parameters, step by step.

The inputs of every forward are in the files, so data and drawing of decoders play no role. Each run starts from an ARC
checkpoint. Two of our deliberate deviations are undone here: β1 follows the reference's cycle (oddity 44), and a
parameter whose gradient is exactly zero is left out of the step, as `grad=None` is in the reference. In our runs a
marker of the step's decoder that no context of the step ends with gets a zero gradient and takes part.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from arc_ds.config.schema import OptimizerConfig
from arc_ds.model.compressor import Compressor
from arc_ds.training.optim import PortAdamW, make_param_groups
from tests.parity.golden import (
    GoldenCase,
    build_case_compressor,
    build_case_decoder,
    internal_name,
    pack_case,
    to_internal,
)

# Relative errors. Worst measured over all runs (float32, one thread): losses 5.0e-7 and norms 4.9e-6 (train_multi),
# parameters 2.4e-5 of the distance that they moved (train_microbatch).
LOSS_BOUND, NORM_BOUND, PARAMETER_BOUND = 1e-5, 1e-4, 1e-4
RUNS = ["train_freeze", "train_microbatch", "train_multi", "train_multi_fair_instruct", "train_pretrain"]


@dataclass(kw_only=True)
class Trained:
    """Results of a run: relative errors of losses and gradient norms, and its compressor before and after."""

    start: dict[str, Tensor]
    compressor: Compressor
    loss_errors: list[float] = field(default_factory=list)
    norm_errors: list[float] = field(default_factory=list)

    def parameter_errors(self, root: Path, name: str, meta: dict[str, Any]) -> dict[str, float]:
        """Errors of final parameters, and of the distance of each from its start, relative to the distance."""
        final, config = dict(self.compressor.named_parameters()), self.compressor.encoder.config
        errors = {}
        for theirs, expected in load_file(root / "train" / name / "tensors.safetensors").items():
            ours = internal_name(theirs)
            difference, moved = final[ours] - to_internal(ours, expected, config), final[ours] - self.start[ours]
            errors[theirs] = (difference.norm() / moved.norm().clamp(min=1e-9)).item()
        for theirs, stats in meta["final_param_stats"].items():
            ours = internal_name(theirs)
            moved = (final[ours].double() - self.start[ours].double()).norm().item()
            errors[f"distance of {theirs}"] = abs(moved - stats["delta_l2"]) / max(stats["delta_l2"], 1e-9)
        return errors


def train(root: Path, name: str, *, change: Callable[[PortAdamW, int], None] | None = None) -> tuple[Trained, Any]:
    """Repeat a run. change: spoils the optimizer before a step."""
    folder = root / "train" / name
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    microbatches = json.loads((folder / "microbatches.json").read_text(encoding="utf-8"))
    config, steps = meta["config"], meta["optimizer_steps"]
    compressor = build_case_compressor(_case(root, name, config, microbatches[0]))
    compressor.encoder.requires_grad_(not config.get("freeze_embedder", False))
    optim = config["optim"]
    rates = OptimizerConfig(
        encoder_lr=optim["max_lr"],
        markers_lr=optim["max_lr"],
        bridge_lr=optim["max_lr_projector"],
        weight_decay=optim["weight_decay"],
    )
    optimizer = PortAdamW(make_param_groups(compressor, rates), betas=(0.9, 0.95), eps=1e-8)
    trained = Trained(start={n: p.detach().clone() for n, p in compressor.named_parameters()}, compressor=compressor)
    num_parts = config["num_microbatches"]
    assert len(microbatches) == num_parts * len(steps)
    for step, expected in enumerate(steps):
        optimizer.zero_grad()
        parts = microbatches[step * num_parts : (step + 1) * num_parts]
        for part in parts:
            case = _case(root, name, config, part)
            batch, mask = pack_case(case), case.loss_mask
            nll = build_case_decoder(case)(batch, compressor(batch, case.decoder_idx))
            loss = (nll * mask).sum() / mask.sum()
            (loss / num_parts).backward()
            trained.loss_errors.append(abs(loss.item() - part["loss"]) / part["loss"])
        with_gradient = [p for p in compressor.parameters() if p.grad is not None]
        for parameter in with_gradient:
            if not parameter.grad.any():  # type: ignore[union-attr]
                parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(with_gradient, config["max_norm"]).item()
        trained.norm_errors.append(abs(norm - expected["pre_clip_l2"]) / expected["pre_clip_l2"])
        _, embedder_lr, bridge_lr = expected["lr"]
        schedule = SimpleNamespace(lr=lambda _, peak, e=embedder_lr, b=bridge_lr: e if peak == optim["max_lr"] else b)
        optimizer.prepare(schedule, step, [part["llm_number"] for part in parts])  # type: ignore[arg-type]
        for group in optimizer.param_groups:
            group["betas"] = (expected["beta1"][1], 0.95)
        if change is not None:
            change(optimizer, step)
        optimizer.step()
    return trained, meta


def _case(root: Path, name: str, config: dict[str, Any], microbatch: dict[str, Any]) -> GoldenCase:
    """A microbatch as a golden case."""
    mask = microbatch["y_mask"]
    tensors = {"in.x": microbatch["x"], "in.y": microbatch["y"], "in.embeddings": microbatch["embeddings"]}
    meta = {
        **microbatch,
        **config["pipeline"],
        "decoders": [path.removeprefix("<golden>/") for path in config["llm_paths"]],
        "arc_checkpoint": config["from_ckpt"]["bridge_path"].split("/")[2],
    }
    found = {key: torch.tensor(value) for key, value in tensors.items()}
    return GoldenCase(root, name, meta, found | ({} if mask is None else {"in.y_mask": torch.tensor(mask)}))


@pytest.mark.parametrize("name", RUNS)
def test_losses_norms_and_final_parameters_of_a_run_are_reproduced(golden: Path, name: str) -> None:
    trained, meta = train(golden, name)
    errors = trained.parameter_errors(golden, name, meta)
    assert max(trained.loss_errors) < LOSS_BOUND and max(trained.norm_errors) < NORM_BOUND
    assert {key: error for key, error in errors.items() if not error <= PARAMETER_BOUND} == {}
    trained_names = {internal_name(n) for n in meta["final_param_stats"]}
    for parameter_name, parameter in trained.compressor.named_parameters():
        assert parameter.requires_grad == (parameter_name in trained_names), parameter_name


def _constant_beta(optimizer: PortAdamW, step: int) -> None:
    for group in optimizer.param_groups:
        group["betas"] = (0.9, 0.95)


def _no_decay(optimizer: PortAdamW, step: int) -> None:
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0


def _one_rate(optimizer: PortAdamW, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("change", [_constant_beta, _no_decay, _one_rate])
def test_another_optimizer_is_noticed(golden: Path, change: Callable[[PortAdamW, int], None]) -> None:
    trained, meta = train(golden, "train_multi", change=change)
    errors = trained.parameter_errors(golden, "train_multi", meta)
    assert max(errors.values()) > 1e-2


def test_every_run_of_the_golden_files_is_listed(golden: Path) -> None:
    assert sorted(path.parent.name for path in golden.glob("train/*/meta.json")) == RUNS

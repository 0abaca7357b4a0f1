"""One training step of a golden case with our modules, and the error of every golden number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arc_ds.batch.packing import PackedBatch
from arc_ds.model.backbone import Stream
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.compressor import Compressor
from arc_ds.model.decoder import Decoder
from tests.parity.golden import (
    GoldenCase,
    build_case_compressor,
    build_case_decoder,
    internal_name,
    pack_case,
    to_internal,
)

NOT_COMPARED = ("in.", "param.", "logits_rows")


@dataclass(frozen=True, kw_only=True)
class Step:
    """The results of forward and backward of a case.

    outputs: outputs by golden name.
    gradients: gradients by our name; None for a parameter without gradient.
    """

    outputs: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor | None]
    config: BackboneConfig


def run_case(
    case: GoldenCase,
    *,
    compressor: Compressor | None = None,
    decoder: Decoder | None = None,
    batch: PackedBatch | None = None,
    port_idx: int | None = None,
) -> Step:
    """Run a case. Arguments replace parts of the case, for deliberately wrong variants."""
    compressor = compressor or build_case_compressor(case)
    decoder = decoder or build_case_decoder(case)
    batch = batch or pack_case(case)
    port_idx = case.decoder_idx if port_idx is None else port_idx
    seen = _watch(compressor, decoder, port_idx)
    z_ZD = compressor(batch, port_idx)
    nll = decoder(batch, z_ZD)
    mask = case.loss_mask
    loss = (nll * mask).sum() / mask.sum()
    loss.backward()
    with torch.no_grad():
        logits = decoder.logits(batch, z_ZD, batch.text_rows[case.tensors["logits_rows"]])
    outputs = {name: tensor.detach() for name, tensor in seen.items()}
    outputs |= {
        "comp.bridged": z_ZD.detach(),
        "logits": logits,
        "token_nll": nll.detach(),
        "token_bits_masked": nll.detach() / torch.tensor(2.0).log() * mask,
        "loss_masked": loss.detach()[None],
        "loss_mean": nll.detach().mean()[None],
        "grad.enc.pooled": seen["enc.pooled"].grad,
    }
    gradients = {name: p.grad for name, p in compressor.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in decoder.parameters()), "a frozen decoder got gradients"
    return Step(outputs=outputs, gradients=gradients, config=compressor.encoder.config)


def errors_of(step: Step, case: GoldenCase) -> dict[str, float]:
    """The largest difference of each golden tensor and statistic, relative to its largest value."""
    errors: dict[str, float] = {}
    for name, expected in case.tensors.items():
        if not name.startswith(NOT_COMPARED):
            errors[name] = relative_error(_ours(step, name), _golden(step, name, expected))
    for name, stats in (case.meta.get("grad_stats") or {}).items():
        gradient = step.gradients[internal_name(name)]
        errors.update(_stats_errors(name, gradient, stats))
    for name in ("loss_masked", "loss_mean"):
        if name in case.meta:
            errors[f"meta.{name}"] = abs(step.outputs[name].item() - case.meta[name]) / case.meta[name]
    return errors


def relative_error(ours: Tensor, expected: Tensor) -> float:
    """Largest difference divided by the largest expected value. Shapes must be equal and `expected` nonzero."""
    assert ours.shape == expected.shape, f"shape {tuple(ours.shape)}, expected {tuple(expected.shape)}"
    assert expected.abs().max() > 0, "the golden tensor is all zero: nothing moved"
    return ((ours - expected).abs().max() / expected.abs().max()).item()


def _watch(compressor: Compressor, decoder: Decoder, port_idx: int) -> dict[str, Tensor]:
    """Return a dict that the next forward fills with the hidden states that are in the golden files."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Any) -> None:
            if isinstance(output, Stream):
                output = output.total_TD
            if "cache" in kwargs:  # a decoder layer that ran prefix and suffix separately
                output = kwargs["cache"].prefix.join(kwargs["cache"].stream.total_TD, output)
            if name == "enc.pooled":
                output.retain_grad()
            seen.setdefault(name, output)

        return hook

    def keep_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.setdefault("comp.with_special", args[0])

    compressor.encoder.register_forward_hook(keep("enc.pooled"), with_kwargs=True)
    compressor.ports[port_idx].bridge.register_forward_pre_hook(keep_input)
    decoder.tok_embeddings.register_forward_hook(keep("trace.dec.input"), with_kwargs=True)
    for side, layers in (("enc", compressor.encoder.layers), ("dec", decoder.layers)):
        for i, layer in enumerate(layers):
            layer.register_forward_hook(keep(f"trace.{side}.layer{i}"), with_kwargs=True)
    return seen


def _ours(step: Step, name: str) -> Tensor:
    if name in step.outputs:
        return step.outputs[name]
    kind, _, parameter = name.partition(".")
    gradient = step.gradients[internal_name(parameter)]
    assert gradient is not None, f"{parameter} has a golden gradient but got none"
    return gradient.norm(dim=-1) if kind == "grad_rownorm" else gradient


def _golden(step: Step, name: str, expected: Tensor) -> Tensor:
    if name in step.outputs or not name.startswith("grad."):
        return expected
    internal = internal_name(name.removeprefix("grad."))
    return to_internal(internal, expected, step.config)


def _stats_errors(name: str, gradient: Tensor | None, stats: Mapping[str, float] | None) -> dict[str, float]:
    if stats is None:  # no gradient: our unused port runs idle and gets exactly zero
        idle = gradient is None or not gradient.any()
        return {f"stats.{name}": 0.0 if idle else float("inf")}
    assert gradient is not None and gradient.numel() == stats["numel"], name
    g = gradient.double()
    # The error of a sum of n values of both signs scales with its terms, not with its own value.
    scale = stats["l2"] * stats["numel"] ** 0.5
    return {
        f"stats.{name}.sum": abs(g.sum().item() - stats["sum"]) / scale,
        f"stats.{name}.l2": abs(g.norm().item() - stats["l2"]) / stats["l2"],
        f"stats.{name}.absmax": abs(g.abs().max().item() - stats["absmax"]) / stats["absmax"],
    }

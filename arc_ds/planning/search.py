"""The nearest config that fits, and the scaling of a run."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from arc_ds.config.schema import RunConfig
from arc_ds.planning.hardware import Machine, hosts_of
from arc_ds.planning.plan import Plan, RunModel, make_plan, read_settings

Reload = Callable[[Sequence[str]], RunConfig]
"""The config with further overrides."""

OFFLOAD_CONFIG = "zero3_offload.json"
"""Searched next to the config's own DeepSpeed JSON."""
SWEEP = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
COMMUNICATION_BOUND = 0.2
"""Above this exposed share of a step, the sweep calls it bound by communication."""


class Fit(NamedTuple):
    """A config that fits: overrides that `arc-ds plan` and `arc-ds train` accept, and its plan."""

    overrides: tuple[str, ...]
    plan: Plan


def nearest_fit(config: RunConfig, model: RunModel, machine: Machine, reload: Reload) -> Fit | None:
    """The fastest config that fits, among changes that leave the results of the run as they are.

    The changes are micro-batches, activation checkpointing, the decoders' placement and the offload of the optimizer.
    """
    found: list[Fit] = []
    for changes in _changes(config, machine):
        # More changes than those of a fit without further micro-batches would only be slower.
        if any(set(fit.overrides) <= set(changes) for fit in found):
            continue
        plan = _fewest_micro_batches(config, model, machine, reload, changes)
        if plan is not None and plan.fits:
            more = plan.config.micro_batches != config.micro_batches
            number = (f"micro_batches={plan.config.micro_batches}",) if more else ()
            found.append(Fit((*number, *changes), plan))
    return min(found, key=lambda fit: (fit.plan.time.total, len(fit.overrides)), default=None)


def _fewest_micro_batches(
    config: RunConfig, model: RunModel, machine: Machine, reload: Reload, overrides: tuple[str, ...]
) -> Plan | None:
    """The plan with the smallest number of micro-batches that fits; else that of the largest number.

    The numbers are multiples of the config's own that divide the batch of a rank. None if there is none.
    """
    share, rest = divmod(config.data.batch_size, machine.num_gpus)
    numbers = [n for n in range(config.micro_batches, share + 1, config.micro_batches) if share % n == 0]

    def plan_of(micro_batches: int) -> Plan:
        return make_plan(reload((*overrides, f"micro_batches={micro_batches}")), model, machine)

    if rest or not numbers:
        return None
    last = plan_of(numbers[-1])  # if even this does not fit, no other number needs a trace
    if not last.fits:
        return last
    return plan_of(numbers[bisect_left(numbers, True, key=lambda number: plan_of(number).fits)])


def _changes(config: RunConfig, machine: Machine) -> Iterator[tuple[str, ...]]:
    """Combinations of the other changes, as overrides; the first one is empty."""
    decoders = list(config.trained_decoders)
    encoder_levels = _more(config.encoder.activation_checkpointing)
    decoder_levels = _more(config.decoders[decoders[0]].activation_checkpointing)
    is_offloaded = read_settings(config, machine).offload_optimizer
    offload = Path(config.deepspeed).with_name(OFFLOAD_CONFIG)
    offloads = ["", *([str(offload)] if offload.exists() and not is_offloaded else [])]
    placements = ["", *(["zero3"] if machine.num_gpus > 1 else []), *(["zero3+hpz"] if machine.num_hosts > 1 else [])]
    for moved_to, placement, of_encoder, of_decoders in itertools.product(
        offloads, placements, ["", *encoder_levels], ["", *decoder_levels]
    ):
        overrides = [f"encoder.activation_checkpointing={of_encoder}"] if of_encoder else []
        for idx in decoders:
            overrides += [f"decoders.{idx}.activation_checkpointing={of_decoders}"] if of_decoders else []
            overrides += [f"decoders.{idx}.placement={placement}"] if placement else []
        yield (*overrides, *([f"deepspeed={moved_to}"] if moved_to else []))


def _more(now: str) -> list[str]:
    """The values of `activation_checkpointing` after the present one: each needs less memory and more time."""
    levels = ["none", "selective", "full"]
    return levels[levels.index(now) + 1 :]


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One number of GPUs.

    plan: with the smallest number of micro-batches that fits, or the largest that does not; None if the batch cannot
        be divided.
    efficiency: tokens per second and GPU, as a share of the best row.
    grown: the plan of a batch that grows with the GPUs: the samples per GPU are those of the planned machine.
    grown_batch: its `data.batch_size`.
    grown_efficiency: as `efficiency`.
    limit: why it scales no further; empty if it does.
    """

    machine: Machine
    plan: Plan | None
    efficiency: float
    grown: Plan
    grown_batch: int
    grown_efficiency: float
    limit: str


def sweep(config: RunConfig, model: RunModel, machine: Machine, reload: Reload) -> tuple[SweepRow, ...]:
    """The run on numbers of GPUs up to 1024, with the planned machine's hosts."""
    per_gpu = config.data.batch_size // machine.num_gpus
    machines = [
        machine._replace(num_gpus=number, num_hosts=hosts_of(number, machine.gpus_per_host))
        for number in sorted({*SWEEP, machine.num_gpus})
    ]
    fixed = [_fewest_micro_batches(config, model, each, reload, ()) for each in machines]
    grown = []
    for each in machines:
        batch_size = (f"data.batch_size={per_gpu * each.num_gpus}",)
        grown.append(_fewest_micro_batches(reload(batch_size), model, each, reload, batch_size))
    rows = []
    for each, plan, share, other, other_share in zip(
        machines, fixed, _efficiencies(fixed), grown, _efficiencies(grown), strict=True
    ):
        assert other is not None, "a batch that is a multiple of the GPUs can be divided"
        rows.append(
            SweepRow(
                machine=each,
                plan=plan,
                efficiency=share,
                grown=other,
                grown_batch=other.config.data.batch_size,
                grown_efficiency=other_share,
                limit=_limit(config, each, plan),
            )
        )
    return tuple(rows)


def _efficiencies(plans: Sequence[Plan | None]) -> list[float]:
    """Encoder tokens per second and GPU, as shares of the largest; 0 without a plan that fits."""
    rates = [
        plan.tokens / plan.time.total / plan.machine.num_gpus if plan is not None and plan.fits else 0.0
        for plan in plans
    ]
    best = max(*rates, 1e-9)
    return [rate / best for rate in rates]


def _limit(config: RunConfig, machine: Machine, plan: Plan | None) -> str:
    if plan is None:
        batch, parts = config.data.batch_size, machine.num_gpus * config.micro_batches
        micro = f" × {config.micro_batches} micro-batches" if config.micro_batches > 1 else ""
        nearest = -(-batch // parts) * parts
        return f"data.batch_size={batch} cannot be divided by {machine.num_gpus} ranks{micro}; {nearest} can"
    if not plan.fits:
        return "does not fit"
    time = plan.time
    if time.exposed > COMMUNICATION_BOUND * time.total:
        return f"communication: {time.exposed / time.total:.0%} of the step"
    if time.launches > time.products + time.other:
        return f"too few sequences per GPU ({plan.samples}): launches take longer than the GPU"
    return ""

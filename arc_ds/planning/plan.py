"""The plan of a run on a machine: memory, communication, time and disk.

    plan = make_plan(config, model, machine)

Everything follows from sizes: the traces of `pass_trace.py`, the gathers of `zero.py`, the operations of `flops.py` and
the rates of `hardware.py`. README.md in this folder has the assumptions and their calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from arc_ds.batch.packing import PackedBatch, pack
from arc_ds.config.deepspeed import fill_deepspeed
from arc_ds.config.schema import DecoderConfig, RunConfig
from arc_ds.config.validate import check_world_size
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.compressor import Compressor
from arc_ds.model.spec import CompressorSpec
from arc_ds.planning.batches import MicroBatch, SampleKinds, micro_batch
from arc_ds.planning.flops import StepFlops, count_flops
from arc_ds.planning.hardware import GPUS, LAUNCH_S, Machine
from arc_ds.planning.pass_trace import KINDS, PassTrace, trace_pass
from arc_ds.planning.zero import Gathers, Weights, ZeroSettings, count_reductions, simulate_gathers

GRADIENT_BYTES = 4  # float32
OPTIMIZER_TRAFFIC = 52
"""Bytes that one update reads and writes per trained element of a rank's shards (`tools/roofline.py`): gradient copied
to float32 6, norm 4, clipping 8, AdamW 28, weight cast to bfloat16 6."""
BUCKET_TRAFFIC = 12
"""Bytes that sending the gradients of a micro-batch reads and writes per trained element, in bfloat16: copied to the
bucket 4, laid out by rank 4, divided by the ranks 4."""
CHECKPOINT_BYTES = 4 + 8
"""The master weight and both moments of each trained element: the optimizer's states, and all that a checkpoint has."""
HOST_ADAM_GBS = 50.0
"""AdamW on the host is bound by its memory: 8 channels of DDR5, shared by the GPUs of a host, at a sixth of their
bandwidth. Not measured."""


@dataclass(frozen=True, kw_only=True)
class RunModel:
    """The model of a run, and the functions that `training` has for it.

    spec: sizes of the compressor.
    decoders: sizes of the trained decoders.
    kinds: kinds of samples.
    build_compressor: makes the compressor of a config on "meta".
    build_decoder: makes a decoder of a config on "meta", by the index of its port.
    count_groups: number of parameter groups of a config's optimizer, whose norms are summed one by one.
    choose_placement: `training.engine.choose_placement`.
    replicated_share: `training.engine.REPLICATED_SHARE`.
    """

    spec: CompressorSpec
    decoders: tuple[BackboneConfig, ...]
    kinds: SampleKinds
    build_compressor: Callable[[RunConfig], Compressor]
    build_decoder: Callable[[RunConfig, int], nn.Module]
    count_groups: Callable[[RunConfig, Compressor], int]
    choose_placement: Callable[..., str]
    replicated_share: float
    _cache: dict[Any, Any] = field(default_factory=dict)

    def compressor(self, config: RunConfig) -> Compressor:
        """The compressor; built once for equal settings of the encoder."""
        return self._once(("compressor", config.encoder), lambda: self.build_compressor(config))

    def decoder(self, config: RunConfig, idx: int) -> nn.Module:
        """A decoder; built once for equal settings."""
        checkpointing = _trained(config)[idx].activation_checkpointing
        return self._once(("decoder", idx, checkpointing), lambda: self.build_decoder(config, idx))

    def batch(self, config: RunConfig, num_samples: int) -> tuple[MicroBatch, PackedBatch]:
        """The micro-batch of a part with `num_samples` samples, and its packed form on the host."""

        def make() -> tuple[MicroBatch, PackedBatch]:
            packing = self.spec.packing
            micro = micro_batch(self.kinds.kinds, num_samples, config, packing)
            return micro, pack(micro.samples, packing)

        limits = config.data.max_encoder_tokens, config.data.max_decoder_rows
        return self._once(("batch", num_samples, config.micro_batches, limits), make)

    def trace(self, config: RunConfig, idx: int, num_samples: int) -> PassTrace:
        """The trace of a micro-batch with one decoder."""
        batch = self.batch(config, num_samples)[1]
        key = ("trace", idx, config.encoder, _trained(config)[idx].activation_checkpointing, batch.num_decoder_rows)
        compressor, decoder = self.compressor(config), self.decoder(config, idx)
        return self._once(key, lambda: trace_pass(compressor, decoder, batch.to("meta"), idx))

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]


class Placed(NamedTuple):
    """A decoder's placement. why: how `auto` took it, or that the config names it."""

    name: str
    num_parameters: int
    placement: str
    why: str


class Traffic(NamedTuple):
    """The collectives of one kind in a step.

    engine: "encoder", or the name of a decoder.
    op: all_gather, reduce_scatter or all_reduce.
    num_ranks: size of the group.
    calls: number of collectives.
    full_bytes: bytes of the full tensors.
    """

    engine: str
    op: str
    num_ranks: int
    calls: int
    full_bytes: int

    @property
    def sent_bytes(self) -> float:
        """Bytes that a rank sends in a ring."""
        return self.full_bytes * (2 if self.op == "all_reduce" else 1) * (self.num_ranks - 1) / self.num_ranks


class StepTime(NamedTuple):
    """Seconds of a step, by part.

    products, other: matrix products and all other operations of forward and backward.
    transfers: between the GPU and the host's memory, for offloaded states.
    hidden, exposed: communication during the computation, and after it.
    """

    products: float
    other: float
    optimizer: float
    transfers: float
    launches: float
    hidden: float
    exposed: float

    @property
    def total(self) -> float:
        """Forward and backward on the GPU, or the host's launches if they take longer; and all that comes after."""
        return max(self.products + self.other, self.launches) + self.optimizer + self.transfers + self.exposed


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a run.

    samples: in the largest micro-batch of a rank.
    passes: micro-batches of a step and decoder.
    memory: bytes of a GPU by part; `activations` has the parts of the traced peak.
    host_bytes: host memory of a rank's offloaded states.
    tokens: encoder tokens of a step, of all ranks.
    flops: operations of a step on one rank, without recomputation.
    traced_flops: the same with recomputation.
    """

    config: RunConfig
    machine: Machine
    samples: int
    passes: int
    placed: tuple[Placed, ...]
    memory: Mapping[str, float]
    activations: Mapping[str, float]
    host_bytes: float
    traffic: tuple[Traffic, ...]
    time: StepTime
    tokens: int
    flops: float
    traced_flops: float
    num_trained: int
    num_parameters: int
    kernels: str

    @property
    def used_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.used_bytes <= self.machine.usable_bytes

    @property
    def hours(self) -> float:
        return self.config.steps * self.time.total / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.machine.num_gpus

    @property
    def mfu(self) -> float:
        """Operations without recomputation per second, as a share of the GPU's peak."""
        return self.flops / self.time.total / (GPUS[self.machine.gpu].peak_tflops * 1e12)

    @property
    def checkpoint_bytes(self) -> int:
        return CHECKPOINT_BYTES * self.num_trained

    @property
    def num_checkpoints(self) -> int:
        """Checkpoints on the disk at the end, and the one that is being written."""
        steps, checkpoint = self.config.steps, self.config.checkpoint
        kept = checkpoint.keep_last + (steps // checkpoint.keep_every if checkpoint.keep_every is not None else 0)
        saves = -(-steps // checkpoint.every) if checkpoint.every else 1
        return min(kept + 1, saves)


def make_plan(config: RunConfig, model: RunModel, machine: Machine) -> Plan:
    """Plan a run.

    Raises ConfigError if GPUs × micro_batches does not divide the batch, if nothing is trained, or if the run's
    DeepSpeed JSON is refused.
    """
    num_samples, num_ranks = check_world_size(config, machine.num_gpus), machine.num_gpus
    settings = read_settings(config, machine)
    num_groups = model.count_groups(config, model.compressor(config))  # before a trace, which needs a trained part
    micro, batch = model.batch(config, num_samples)
    names = [decoder.name for decoder in _trained(config)]
    traces = [model.trace(config, idx, num_samples) for idx in range(len(names))]
    largest = max(traces, key=lambda trace: trace.peak_bytes)
    element = 2 if config.precision == "bf16" else 4
    weights = Weights.of(model.compressor(config))
    frozen = [Weights.of(model.decoder(config, idx)) for idx in range(len(names))]
    memory, host_bytes = _states(weights, settings, machine, element)
    placed = _place(config, model, frozen, machine, element, free_bytes=machine.usable_bytes - sum(memory.values()))
    gathers = simulate_gathers(weights, settings)
    of_decoders = [simulate_gathers(each, settings) for each in frozen]
    kept = sum(_kept_elements(each, where.placement, machine) for each, where in zip(frozen, placed, strict=True))
    at_once = [each.peak for each, where in zip(of_decoders, placed, strict=True) if where.placement != "replicated"]
    # On one rank the shards are whole, and no bucket is laid out by rank.
    gathered = gathers.peak + max(at_once, default=0) if num_ranks > 1 else 0
    buckets = settings.reduce_bucket * (2 if num_ranks > 1 else 1)
    # The update copies the gradients of one sub-group. Activations and gathered parameters are free by then.
    copied = 0 if settings.offload_optimizer else min(settings.sub_group, weights.shard(num_ranks, trained_only=True))
    memory |= {
        "decoders": element * kept,
        "gathered parameters": element * gathered,
        "gradient buckets": element * buckets,
        "activations": largest.peak_bytes,
        "update beyond activations": max(GRADIENT_BYTES * copied - largest.peak_bytes - element * gathered, 0),
    }
    passes = micro.per_step * (len(names) if config.decoder_schedule == "same_batch" else 1)
    traffic = _traffic(
        config, model, weights, num_groups, gathers, of_decoders, placed, machine, settings, passes, element
    )
    flops = [
        count_flops(batch, model.spec, sizes, config.encoder.trained_parts, idx)
        for idx, sizes in enumerate(model.decoders)
    ]
    traced_flops = sum(map(_traced_flops, traces, flops)) / len(traces) * passes
    return Plan(
        config=config,
        machine=machine,
        samples=len(micro.samples),
        passes=passes,
        placed=placed,
        memory=memory,
        activations={kind: largest.peak.get(kind, 0) for kind in KINDS},
        host_bytes=host_bytes,
        traffic=traffic,
        time=_time(machine, settings, weights, gathers, traces, traced_flops, traffic, passes, element),
        tokens=batch.num_encoder_tokens * micro.per_step * num_ranks,
        flops=sum(each.total for each in flops) / len(flops) * passes,
        traced_flops=traced_flops,
        num_trained=weights.num_trained,
        num_parameters=sum(weights.sizes),
        kernels=largest.kernels,
    )


def read_settings(config: RunConfig, machine: Machine) -> ZeroSettings:
    """The ZeRO settings of the config's DeepSpeed JSON. Raises ConfigError like `fill_deepspeed`."""
    filled = fill_deepspeed(config.deepspeed, config, machine.num_gpus, machine.gpus_per_host)
    return ZeroSettings.of(filled["zero_optimization"], config.deepspeed)


def _trained(config: RunConfig) -> list[DecoderConfig]:
    return list(config.trained_decoders.values())


def _states(weights: Weights, settings: ZeroSettings, machine: Machine, element: int) -> tuple[dict[str, float], float]:
    """Bytes of a rank's shards on the GPU, by part, and in host memory."""
    shard, trained = weights.shard(machine.num_gpus), weights.shard(machine.num_gpus, trained_only=True)
    copy = weights.shard(settings.hpz_ranks) if settings.hpz_ranks > 1 else 0
    parts: dict[str, float] = {
        "parameters": element * shard * (not settings.offload_parameters),
        "second copy of parameters": element * copy,
        "gradients": GRADIENT_BYTES * trained * (not settings.offload_optimizer),
        "optimizer": CHECKPOINT_BYTES * trained * (not settings.offload_optimizer),
    }
    # Gradients twice: the sum over the micro-batches, and the copy that the update reads.
    offloaded = (CHECKPOINT_BYTES + 2 * GRADIENT_BYTES) * trained * settings.offload_optimizer
    return parts, offloaded + element * shard * settings.offload_parameters


def _kept_elements(weights: Weights, placement: str, machine: Machine) -> int:
    """Elements of a decoder that a rank keeps."""
    if placement == "replicated":
        return sum(weights.sizes)
    copy = weights.shard(machine.gpus_per_host) if placement == "zero3+hpz" else 0
    return weights.shard(machine.num_gpus) + copy


def _place(
    config: RunConfig,
    model: RunModel,
    frozen: Sequence[Weights],
    machine: Machine,
    element: int,
    *,
    free_bytes: float,
) -> tuple[Placed, ...]:
    """Place the decoders one after another, as `training.build` does."""
    placed = []
    for decoder, weights in zip(_trained(config), frozen, strict=True):
        num_parameters = sum(weights.sizes)
        placement = model.choose_placement(
            decoder.placement,
            decoder_bytes=num_parameters * element,
            free_bytes=max(int(free_bytes), 0),
            world_size=machine.num_gpus,
            local_world_size=machine.gpus_per_host,
        )
        why = "the config names it"
        if decoder.placement == "auto":
            share = num_parameters * element / max(free_bytes, 1)
            why = (
                "there is one GPU"
                if machine.num_gpus == 1
                else f"a copy takes {share:.0%} of the memory that is free at that point; whole up to "
                f"{model.replicated_share:.0%}"
            )
        placed.append(Placed(decoder.name, num_parameters, placement, why))
        free_bytes -= element * _kept_elements(weights, placement, machine)
    return tuple(placed)


def _traffic(
    config: RunConfig,
    model: RunModel,
    weights: Weights,
    num_groups: int,
    gathers: Gathers,
    of_decoders: Sequence[Gathers],
    placed: Sequence[Placed],
    machine: Machine,
    settings: ZeroSettings,
    passes: int,
    element: int,
) -> tuple[Traffic, ...]:
    """The collectives of a step. With several decoders that take turns, those of the one with most bytes."""
    num_ranks = machine.num_gpus
    padded = weights.shard(num_ranks, trained_only=True) * num_ranks
    persistent = [size for size in weights.sizes if size <= settings.persistence_threshold]
    refreshed = sum(-(-size // num_ranks) * num_ranks for size in persistent)
    refresh = Traffic("encoder", "all_gather", num_ranks, len(persistent), element * refreshed)
    if settings.hpz_ranks == 1:
        found = [_with_gathers(refresh, gathers, passes, element)]
    else:
        # The update invalidates the second copy of trained parameters. The step's first gather renews it.
        first, again = gathers.part(is_first=True), gathers.part(is_first=False)
        near = _with_gathers(Traffic("encoder", "all_gather", settings.hpz_ranks, 0, 0), again, passes, element)
        found = [_with_gathers(refresh, first, 1, element), _with_gathers(near, first, passes - 1, element)]
    reductions = passes * count_reductions(weights, settings.reduce_bucket)
    found.append(Traffic("encoder", "reduce_scatter", num_ranks, reductions, element * padded * passes))
    if num_ranks > 1:
        classes = len(model.kinds.names) * (len(placed) if config.decoder_schedule == "same_batch" else 1)
        message = 2 * classes + 2 + num_ranks  # labels, notices and losses of `training.step`
        found.append(Traffic("encoder", "all_reduce", num_ranks, 2 + num_groups, 8 * (message + num_groups)))
    of_each = []
    for decoder, each in zip(placed, of_decoders, strict=True):
        if decoder.placement != "replicated":
            group = machine.gpus_per_host if decoder.placement == "zero3+hpz" else num_ranks
            of_each.append(_with_gathers(Traffic(decoder.name, "all_gather", group, 0, 0), each, passes, element))
    if config.decoder_schedule == "same_batch":
        found += [
            one._replace(calls=one.calls // len(placed), full_bytes=one.full_bytes // len(placed)) for one in of_each
        ]
    elif of_each:
        found.append(max(of_each, key=lambda one: one.full_bytes))
    return tuple(found)


def _with_gathers(traffic: Traffic, gathers: Gathers, times: int, element: int) -> Traffic:
    """The traffic with these gathers, each of them `times` times."""
    calls, elements = len(gathers.sizes) * times, gathers.elements(traffic.num_ranks) * times
    return traffic._replace(calls=traffic.calls + calls, full_bytes=traffic.full_bytes + element * elements)


def _traced_flops(trace: PassTrace, flops: StepFlops) -> float:
    """Operations of a micro-batch with those of recomputed layers.

    Those of attention depend on lengths, which a trace lacks. They are counted, and repeated as often as its forwards.
    """
    forward = flops.encoder_forward.attention + flops.decoder_forward.attention
    backward = flops.encoder_backward.attention + flops.decoder_backward.attention
    return trace.product_flops + forward * (1 + trace.repeated_attention) + backward


def _time(
    machine: Machine,
    settings: ZeroSettings,
    weights: Weights,
    gathers: Gathers,
    traces: Sequence[PassTrace],
    traced_flops: float,
    traffic: Sequence[Traffic],
    passes: int,
    element: int,
) -> StepTime:
    """Seconds of a step; see README.md."""
    number, num_ranks = len(traces), machine.num_gpus
    other_bytes = sum(trace.other_bytes for trace in traces) / number * passes
    operations = sum(trace.num_operations for trace in traces) / number * passes
    trained = weights.shard(num_ranks, trained_only=True)
    if num_ranks > 1:
        other_bytes += BUCKET_TRAFFIC * weights.num_trained * passes
    products, other = machine.product_s(traced_flops), machine.copy_s(other_bytes)
    optimizer, moved = machine.copy_s(OPTIMIZER_TRAFFIC * trained), 0.0
    if settings.offload_optimizer:
        optimizer = OPTIMIZER_TRAFFIC * trained * machine.gpus_per_host / (HOST_ADAM_GBS * 1e9)
        # In each micro-batch DeepSpeed sends the sum of the gradients to the host and reads it back (stage3.py,
        # `partition_grads`). Before the update it sends a copy, and after it the new weights come back.
        moved += trained * (2 * GRADIENT_BYTES * passes + GRADIENT_BYTES + element)
    if settings.offload_parameters:
        moved += element * gathers.elements(num_ranks) / num_ranks * passes
    communication = sum(
        machine.ring_s(one.full_bytes, one.calls, one.num_ranks) for one in traffic if one.op != "all_reduce"
    )
    launches = operations * LAUNCH_S
    computation = max(products + other, launches)
    # Nothing runs yet under the first gather, and nothing runs any more under the last reduction.
    first = next(sum(weights.sizes[p] for p in turn) for turn in weights.forward if turn)
    ends = 2 * machine.ring_s(element * first, 1, num_ranks) if communication else 0.0
    hideable = computation if settings.overlap else 0.0
    exposed = min(max(communication - hideable, ends), communication)
    transfers = machine.host_s(moved)
    return StepTime(products, other, optimizer, transfers, launches, communication - exposed, exposed)

"""Stage "step": the paper's pretraining step at true size, and the share of its time that each family of kernels takes.

By DeepSpeed ZeRO-3 on one GPU with the run's own `train_step`; without DeepSpeed, the same model under plain PyTorch.
"""

from __future__ import annotations

import gc
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import roofline
import torch
from gpu_timing import Ceilings, timing
from paper_step import PAPER, TOY, StepSize, build_models, make_batch
from torch import Tensor, nn

import arc_kernels as ak
from arc_ds.batch.packing import PackedBatch
from arc_ds.config.schema import OptimizerConfig
from arc_ds.data.loading.step_batch import MicroBatch, StepBatch
from arc_ds.model.backbone import Recompute
from arc_ds.model.compressor import Compressor
from arc_ds.model.decoder import Decoder
from arc_ds.planning.flops import count_flops
from arc_ds.system import dist
from arc_ds.system.device import free_memory_bytes, peak_bf16_flops, peak_memory_bytes, synchronize
from arc_ds.training.engine import PlacedDecoder, build_engine
from arc_ds.training.optim import PortAdamW, make_param_groups
from arc_ds.training.schedule import RateSchedule
from arc_ds.training.step import train_step
from gpu_stages.context import ROOT, StageContext

BETAS, EPS, WEIGHT_DECAY, MAX_GRAD_NORM = (0.9, 0.95), 1e-8, 0.1, 1.0
LEARNING_RATE = 0.0  # the work is the same, and all variants can be compared
MAX_DISAGREEMENT = 0.02
"""Between variants, relative, of loss and gradient norm: an alarm. Sums in another order differ by less in bfloat16."""

NUM_WARMUP, NUM_TIMED = 3, 10
REHEARSED_WARMUP, REHEARSED_TIMED = 1, 2  # a spread needs two times
GIB = 2**30

# Kernel names, in the order of the search: the first family with a matching word takes the kernel.
FAMILIES: dict[str, tuple[str, ...]] = {
    "collectives": ("nccl",),
    "attention": ("forward_kernel", "dq_kernel", "dkv_kernel", "delta_kernel", "flash", "fmha", "softmax", "sdpa"),
    "cross-entropy": ("_softmax_minus_label", "_scale_rows"),
    "products": ("gemm", "nvjet", "cutlass", "wgmma", "splitk", "cublas", "aten::mm", "aten::addmm", "aten::bmm"),
    "norms": ("norm_forward", "norm_backward", "weight_gradient", "rms_norm", "layer_norm"),
    "SwiGLU": ("swiglu", "silu"),
    "pooling": ("pool_",),
    "rotary": ("rotary",),
    "by index": ("splice", "_gather_rows", "_sum_runs", "index", "gather", "scatter", "sort", "radix"),
    "optimizer": ("adam", "multi_tensor", "lpnorm", "foreach"),
    "copies and casts": ("memcpy", "memset", "copy", "cat"),
    "other": ("",),
}
"""The names are those of the roofline, as far as a kernel's name tells: there additions of gradients stand apart."""

# "norm_forward_kernel" holds "forward_kernel": the more special names go first.
_ORDER = ("collectives", "norms", "SwiGLU", "pooling", "rotary", "cross-entropy", *FAMILIES)


class Outcome(NamedTuple):
    """Loss and gradient norm (before clipping) of one step; scalars on the device."""

    loss: Tensor
    grad_norm: Tensor


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the step.

    name: as rows call it.
    kernels: the implementation, as `arc_kernels.use` takes it.
    recompute: whether layers run again in backward.
    """

    name: str
    kernels: Any
    recompute: bool = False


VARIANTS = (
    Variant(name="kernels", kernels="triton"),
    Variant(name="plain torch", kernels="reference"),
    Variant(name="kernels, recomputed", kernels="triton", recompute=True),
)
"""Recomputation comes last: it changes the order of modules, which ends ZeRO-3's prefetch trace."""


def run(context: StageContext) -> None:
    """Append the rows of all variants at the largest size that fits."""
    engines = ["ZeRO-3", "plain PyTorch"] if find_spec("deepspeed") else ["plain PyTorch"]
    try:
        for size in [TOY] if context.rehearse else _sizes_that_fit(context.device):
            if _measure_if_it_fits(context, size, engines):
                return
            _free_memory()
    finally:
        dist.close_distributed()  # not before: DeepSpeed keeps the first process group, and cannot take another
    context.result("step", "not measured", "no size fits this GPU; its memory is taken, or under 12 GiB")


def _measure_if_it_fits(context: StageContext, size: StepSize, engines: Sequence[str]) -> bool:
    """Measure by the first engine that starts; False if the GPU's memory is too small for this size."""
    for engine_name in engines:
        try:
            _measure(context, size, engine_name)
            return True
        except torch.OutOfMemoryError as error:
            context.failure(f"{size}", error)
            return False
        except Exception as error:  # without DeepSpeed or NCCL there is still the step of plain PyTorch
            context.failure(f"step by {engine_name}", error)
        _free_memory()
    return True


def _free_memory() -> None:
    """Give back what a failed step has left: engines refer to themselves."""
    gc.collect()
    torch.cuda.empty_cache()


def _sizes_that_fit(device: torch.device) -> list[StepSize]:
    """The paper's size and smaller ones, from the largest on whose estimate is below the free memory."""
    sizes = [PAPER, replace(PAPER, batch_size=8), replace(PAPER, batch_size=4)]
    for part in (2, 4, 8):
        encoder = replace(PAPER.encoder, num_layers=max(PAPER.encoder.num_layers // part, 4))
        decoder = replace(PAPER.decoder, num_layers=PAPER.decoder.num_layers // part)
        sizes.append(replace(PAPER, batch_size=4, encoder=encoder, decoder=decoder))
    free = free_memory_bytes(device) or 0
    return [size for size in sizes if estimated_bytes(size) < free]


def estimated_bytes(size: StepSize) -> float:
    """A rough count of the memory that a step takes, from its parameters and the rows that backward keeps."""
    compressor, decoder = build_models(size, device="meta", dtype=torch.bfloat16)
    trained, frozen = (sum(p.numel() for p in model.parameters()) for model in (compressor, decoder))
    encoder_rows = size.batch_size * size.context_tokens
    decoder_rows = size.batch_size * (size.continuation_tokens + size.context_tokens // size.pooling_factor + 1)
    kept = 0.0
    for rows, config, num_layers in (
        (encoder_rows, size.encoder, size.spec.num_layers),
        (decoder_rows, size.decoder, size.decoder.num_layers),
    ):
        heads = (config.num_heads + config.num_kv_heads) * config.head_dim
        kept += 2.0 * rows * num_layers * (4 * config.hidden_size + 2 * heads + 3 * config.ffn_size)
    return 20.0 * trained + 2.0 * frozen + kept + 4 * GIB


def _measure(context: StageContext, size: StepSize, engine_name: str) -> None:
    dtype = torch.float32 if context.rehearse else torch.bfloat16
    compressor, decoder = build_models(size, device=context.device, dtype=dtype)
    batch = make_batch(size)
    make = _zero3_step if engine_name == "ZeRO-3" else _plain_step
    agree: dict[str, float] = {}
    with make(compressor, decoder, batch, context.device) as step:
        for variant in VARIANTS:
            if context.seconds_left() < 0:
                context.result("step", "left out", "no time", case=str(size), variant=variant.name)
                continue
            recompute: Recompute = "full" if variant.recompute else "none"
            compressor.encoder.activation_checkpointing = decoder.activation_checkpointing = recompute
            try:
                with ak.use(variant.kernels):
                    _measure_variant(context, size, batch, variant, engine_name, step, agree)
            except torch.OutOfMemoryError as error:
                if variant is VARIANTS[0]:
                    raise
                context.failure(f"step, {variant.name}", error)
            except Exception as error:
                context.failure(f"step, {variant.name}", error)
            else:
                continue
            _free_memory()  # after the exception, whose frames hold the step's tensors


def _measure_variant(
    context: StageContext,
    size: StepSize,
    batch: PackedBatch,
    variant: Variant,
    engine_name: str,
    step: Callable[[], Outcome],
    agree: dict[str, float],
) -> None:
    device = context.device
    num_warmup, num_timed = (REHEARSED_WARMUP, REHEARSED_TIMED) if context.rehearse else (NUM_WARMUP, NUM_TIMED)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(num_warmup):
        outcome = step()
    times_ms = []
    for _ in range(num_timed):
        synchronize(device)
        started = time.perf_counter()
        outcome = step()
        synchronize(device)
        times_ms.append(1e3 * (time.perf_counter() - started))
    timed = timing(times_ms)
    seconds = timed.median_ms / 1e3
    flops = count_flops(batch, size.spec, size.decoder).total
    note = engine_name + ("" if size in (PAPER, TOY) else "; smaller than the paper's, which does not fit this GPU")
    add = partial(context.add, "step", case=str(size), variant=variant.name, note=note)

    # The learning rates are 0, so all variants see the same weights.
    for metric, value in (("loss", float(outcome.loss)), ("gradient norm", float(outcome.grad_norm))):
        ratio = value / agree.setdefault(metric, value)
        add(metric, round(value, 6), ratio=round(ratio, 5))
        if not abs(ratio - 1) <= MAX_DISAGREEMENT:
            context.result(metric, "different", f"{ratio:.4f} times the first variant's", variant=variant.name)
    ceilings, stated = context.ceilings(), peak_bf16_flops(device)
    add("step time", round(timed.median_ms, 2), "ms", spread=round(timed.spread_ms, 2))
    add("encoder tokens", round(batch.num_encoder_tokens / seconds, 1), "1/s")
    add("decoder rows", round(batch.num_decoder_rows / seconds, 1), "1/s")
    share = round(flops / seconds / ceilings.matrix, 4) if ceilings else ""
    add("rate", round(flops / seconds / 1e12, 3), "TFLOP/s", share=share)
    if stated:
        add("MFU", round(flops / seconds / stated, 4))
    add("peak memory", round(peak_memory_bytes(device) / GIB, 2), "GiB")
    add("host waits", _count_waits(step, device))
    for family, ms in _family_times(step, device, timed.median_ms).items():
        add(f"time in {family}", round(ms, 3), "ms", share=round(ms / timed.median_ms, 4))
    if ceilings:
        for family, ms in _floors(size, variant, ceilings).items():
            add(f"floor of {family}", round(ms, 3), "ms")


def _count_waits(step: Callable[[], Outcome], device: torch.device) -> int:
    """How often the host waits for the GPU in one step, as torch's synchronisation warnings tell."""
    if device.type != "cuda":
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{one.filename}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)]
    for place, count in Counter(waits).items():
        print(f"host waits {count} times at {place}")
    return len(waits)


def _family_times(step: Callable[[], Outcome], device: torch.device, step_ms: float) -> dict[str, float]:
    """Milliseconds of one step by family of kernels, and the time in which the GPU had nothing to do."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        step()
        synchronize(device)
    times: Counter[str] = Counter()
    names: Counter[str] = Counter()
    for event in profiled.events():
        is_on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if is_on_gpu != on_gpu or getattr(event, "is_user_annotation", False):
            continue
        ms = (event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total) / 1e3
        times[family_of(event.name)] += ms
        names[event.name] += ms
    for name, ms in names.most_common(25):
        print(f"{ms:10.3f} ms  {family_of(name):22} {name[:100]}")
    busy = sum(times.values())
    return {family: times[family] for family in FAMILIES if times[family]} | (
        {"nothing (idle)": max(0.0, step_ms - busy)} if on_gpu else {}
    )


def _floors(size: StepSize, variant: Variant, ceilings: Ceilings) -> dict[str, float]:
    """Milliseconds of each family by the roofline, at the measured rates."""
    counted = roofline.count(
        size, implementation="ours" if variant.kernels == "triton" else "torch", recompute=variant.recompute
    )
    rates = {"tflops": ceilings.matrix / 1e12, "gbps": ceilings.copy / 1e9}
    floors = {family: counted.of(family).ms(**rates) for family in roofline.FAMILIES}
    floors["optimizer"] = counted.optimizer_bytes / ceilings.copy * 1e3
    return floors | {"all": sum(floors.values())}


def family_of(kernel: str) -> str:
    """The family of a kernel by its name."""
    name = kernel.lower()
    return next(family for family in _ORDER if any(word in name for word in FAMILIES[family]))


@contextmanager
def _zero3_step(
    compressor: Compressor, decoder: Decoder, batch: PackedBatch, device: torch.device
) -> Iterator[Callable[[], Outcome]]:
    """The run's own training step by DeepSpeed ZeRO-3 on this one device."""
    dist.init_distributed(device)
    config = json.loads((ROOT / "ds_configs" / ("cpu.json" if device.type == "cpu" else "zero3.json")).read_text())
    config |= {
        "train_batch_size": len(batch.tasks),
        "train_micro_batch_size_per_gpu": len(batch.tasks),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": MAX_GRAD_NORM,
        "bf16": {"enabled": device.type == "cuda"},
    }
    rates = {f"{part}_lr": LEARNING_RATE for part in ("encoder", "bridge", "markers")}
    groups = make_param_groups(compressor, OptimizerConfig(**rates, weight_decay=WEIGHT_DECAY))
    optimizer = PortAdamW(groups, betas=BETAS, eps=EPS, fused=device.type == "cuda")
    engine = build_engine(compressor, optimizer, config)
    micro = MicroBatch(decoder_idx=0, batch=batch.pin_memory() if device.type == "cuda" else batch)
    decoders = [PlacedDecoder(module=decoder)]
    schedule = RateSchedule(total_steps=1, warmup_steps=0, initial_lr=0.0, final_lr=0.0, kind="constant")

    def step() -> Outcome:
        result = train_step(
            engine,
            decoders,
            StepBatch(step=0, decoder_idxs=(0,), micro_batches=(micro,)),
            schedule=schedule,
            tasks=("continuation",),
        )
        return Outcome(result.loss, result.grad_norm)

    try:
        yield step
    finally:
        engine.destroy()


@contextmanager
def _plain_step(
    compressor: Compressor, decoder: Decoder, batch: PackedBatch, device: torch.device
) -> Iterator[Callable[[], Outcome]]:
    """The same step by PyTorch alone: AdamW over float32 master weights, clipped gradients."""
    trained = [p for p in compressor.parameters() if p.requires_grad]
    masters = [p.detach().float().clone() for p in trained]
    optimizer = torch.optim.AdamW(
        masters, lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=device.type == "cuda"
    )
    pinned = batch.pin_memory() if device.type == "cuda" else batch

    def step() -> Outcome:
        here = pinned.to(device)
        nll_L = decoder(here, compressor(here))
        loss = nll_L.sum() / batch.num_labels
        loss.backward()
        for parameter, master in zip(trained, masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
            parameter.grad = None
        grad_norm = nn.utils.clip_grad_norm_(masters, MAX_GRAD_NORM)
        optimizer.step()
        torch._foreach_copy_([p.detach() for p in trained], masters)
        return Outcome(loss.detach(), grad_norm)

    yield step

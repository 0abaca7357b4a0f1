"""The training step in plain PyTorch, on one process with the joined batch, as a reference for DeepSpeed's ranks.

Also contains the small random models and ragged samples of these comparisons. Every rank creates the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from arc_ds.batch.groups import GroupRule
from arc_ds.batch.packing import PoolingSpec, pack
from arc_ds.batch.segments import Sample, Segment
from arc_ds.config.schema import OptimizerConfig
from arc_ds.data.loading.micro_batches import MicroBatchLimits, planned_splits, sample_sizes, split
from arc_ds.data.loading.step_batch import MicroBatch, StepBatch
from arc_ds.model.backbone import Recompute
from arc_ds.model.bridge import make_bridge
from arc_ds.model.compressor import Compressor, DecoderPort, connect_adapters
from arc_ds.model.decoder import Decoder
from arc_ds.model.decoder_adapters import DecoderAdapters, DecoderLora
from arc_ds.model.encoder import Encoder, PoolingLayout
from arc_ds.model.lora import add_adapters
from arc_ds.model.pooling import GroupPooling
from arc_ds.model.spec import LoraSpec
from arc_ds.training.engine import PlacedDecoder, build_engine, place_decoder, set_trained
from arc_ds.training.optim import ParamGroup, PortAdamW, make_param_groups
from arc_ds.training.schedule import RateSchedule
from tests.helpers.tiny_compressor import MANY_PARTS, OUTPUT_NORMED
from tests.helpers.tiny_models import tiny_config

TASKS = ("reconstruction", "continuation")
POOLING = PoolingSpec(rules=(GroupRule("factor", 3),))
MAX_GRAD_NORM = 0.05  # far below the norms of these models, so that every step is clipped
# Clipped gradients are of order 3e-4 per element, and another order of summation causes noise of up to 5e-10. AdamW
# divides by |g| + eps. With eps 1e-8, an element whose gradient happens to be zero moves by its noise (observed: one of
# 768 elements differs by 6e-6, all others by 4e-8). This does not indicate a wrong trainer. With eps 1e-6, noise moves
# an element by at most 3e-3 * 5e-10 / 1e-6, 3e-7 of a tensor's norm.
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.95), 1e-6, 0.1
NUM_STEPS = 10
SCHEDULE = RateSchedule(total_steps=NUM_STEPS, warmup_steps=3, initial_lr=1e-6, final_lr=1e-5)

_ENCODER = tiny_config(num_layers=4, ffn_size=48, vocab_size=97)
_DECODERS = (
    tiny_config(hidden_size=48, num_layers=3, num_heads=6, num_kv_heads=3, ffn_size=64, vocab_size=61),
    tiny_config(
        hidden_size=40, num_kv_heads=4, head_dim=10, ffn_size=56, vocab_size=83, rope_theta=5e4, norm_eps=1e-6,
        tie_embeddings=True,
    ),
)  # fmt: skip
# Differences from Llama of encoder and decoders, by name. "qwen" has the parts of Qwen 2 and 3.
PARTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "many": MANY_PARTS,
    "olmo2": OUTPUT_NORMED,
    "qwen": {"qkv_bias": True, "output_bias": True, "qk_norm": "head", "window": 4, "windowed_layers": (1,)},
}


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """The result of a run: loss and gradient norm of each step, and the final parameters."""

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    params: dict[str, Tensor]


def tiny_compressor(
    *,
    trained_layers: int | None = None,
    train_embeddings: bool = True,
    lora_rank: int = 0,
    **kind: Any,
) -> Compressor:
    """Three encoder layers of width 32 and one port per tiny decoder. kind: see `bare_compressor`."""
    compressor = bare_compressor(**kind)
    _fill(compressor.parameters(), seed=1)
    set_trained(
        compressor.encoder,
        trained_layers=trained_layers,
        train_embeddings=train_embeddings,
        train_memory=True,
        lora_rank=lora_rank,
    )
    return compressor


def bare_compressor(
    *,
    activation_checkpointing: Recompute = "none",
    shared_bridge: bool = False,
    parts: str = "llama",
    num_decoders: int = 2,
    lora: LoraSpec | None = None,
    decoder_lora: LoraSpec | None = None,
) -> Compressor:
    """The modules of `tiny_compressor` without weights.

    parts: a name in `PARTS`.
    lora: adapters of the encoder; None for none.
    decoder_lora: adapters of each decoder; None for none.
    """
    encoder = Encoder(
        replace(_ENCODER, **PARTS[parts]), num_layers=3, pooling=PoolingLayout(strategy=GroupPooling("mean")),
        activation_checkpointing=activation_checkpointing,
    )  # fmt: skip
    if lora is not None:
        add_adapters(encoder.layers, rank=lora.rank, scale=lora.scale)
    width = _ENCODER.hidden_size
    bridges = [make_bridge("mlp", width, config.hidden_size, 24) for config in _DECODERS[:num_decoders]]
    if shared_bridge:
        return Compressor(encoder, [DecoderPort(width, nn.Identity()) for _ in bridges], bridges[0])
    ports = [DecoderPort(width, bridge) for bridge in bridges]
    for port, config in zip(ports, _DECODERS, strict=False):
        if decoder_lora is not None:
            sizes = DecoderLora.of(replace(config, **PARTS[parts]), rank=decoder_lora.rank, scale=decoder_lora.scale)
            port.adapters = DecoderAdapters(sizes)
    return Compressor(encoder, ports)


def tiny_decoders(**kind: Any) -> list[Decoder]:
    """Two decoders with different vocabularies, one with a tied head. kind: see `bare_decoders`."""
    decoders = bare_decoders(**kind)
    for seed, decoder in enumerate(decoders):
        _fill(decoder.parameters(), seed=10 + seed)
    return decoders


def bare_decoders(
    *,
    activation_checkpointing: Recompute = "none",
    shared_bridge: bool = False,
    parts: str = "llama",
    num_decoders: int = 2,
) -> list[Decoder]:
    """The modules of `tiny_decoders` without weights. Their widths differ, unless a bridge is shared."""
    configs = [replace(config, **PARTS[parts]) for config in _DECODERS[:num_decoders]]
    if shared_bridge:
        configs[1] = replace(configs[1], hidden_size=configs[0].hidden_size, head_dim=12)
    return [Decoder(config, activation_checkpointing=activation_checkpointing) for config in configs]


def tiny_groups(compressor: Compressor) -> tuple[ParamGroup, ...]:
    """The parameter groups of a tiny compressor; each kind has its own learning rate."""
    rates = OptimizerConfig(encoder_lr=1e-3, bridge_lr=3e-3, markers_lr=2e-3, weight_decay=WEIGHT_DECAY)
    return make_param_groups(compressor, rates)


def tiny_ds_config(*, num_parts: int = 2, **zero: Any) -> dict[str, Any]:
    """DeepSpeed's config of the tiny models. zero: keys of zero_optimization."""
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": num_parts,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
        "zero_optimization": {"stage": 3, "overlap_comm": False, "memory_efficient_linear": False, **zero},
    }


def tiny_engines(
    ds_config: Mapping[str, Any], *, activation_checkpointing: Recompute = "none"
) -> tuple[Any, list[PlacedDecoder]]:
    """The engine of a tiny compressor, and both tiny decoders, sharded. Collective."""
    compressor = tiny_compressor(activation_checkpointing=activation_checkpointing)
    engine = build_engine(compressor, PortAdamW(tiny_groups(compressor), betas=BETAS, eps=EPS), ds_config)
    decoders = tiny_decoders(activation_checkpointing=activation_checkpointing)
    return engine, [place_decoder(decoder, ds_config) for decoder in decoders]


def parameter_bytes(module: nn.Module, *, above: float = 0, at_most: float = math.inf) -> int:
    """Bytes of the module's float32 parameters with a number of elements in this range."""
    return 4 * sum(param.numel() for param in module.parameters() if above < param.numel() <= at_most)


def decoder_of_step(step: int) -> int:
    """The decoder of a step: the same one for three steps, then they alternate."""
    return 0 if step < 3 else step % 2


def samples_of_step(step: int, num_sequences: int = 8, *, decoder_idx: int | None = None) -> list[Sample]:
    """Ragged samples of both tasks, with few labels at the start of the batch and many at its end.

    decoder_idx: the decoder whose tokens the texts have; default: the decoder of the step. Text lengths depend on it,
        but contexts do not.

    In every fourth step, the first half of the batch has no labels.
    """
    decoder_idx = decoder_of_step(step) if decoder_idx is None else decoder_idx
    vocab_size = _DECODERS[decoder_idx].vocab_size
    of_contexts = torch.Generator().manual_seed(1000 + step)
    of_texts = torch.Generator().manual_seed(2000 + 100 * decoder_idx + step)

    def draw(low: int, high: int, vocab: int, generator: torch.Generator) -> list[int]:
        count = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(vocab, (count,), generator=generator).tolist()

    samples = []
    for idx in range(num_sequences):
        in_loss = step % 4 != 3 or idx >= num_sequences // 2
        targets = Segment.text(draw(2, 4 + 2 * idx, vocab_size, of_texts), in_loss=in_loss)
        marker = "rec" if idx % 3 == 0 else "cont"
        context = Segment.context(draw(1, 14, _ENCODER.vocab_size, of_contexts), marker=marker)
        prefix = Segment.text(draw(0, 5, vocab_size, of_texts))
        task = TASKS[0] if marker == "rec" else TASKS[1]
        samples.append(Sample(task, (prefix, context, targets)))
    return samples


def decoders_of_step(step: int, *, same_batch: bool = False, num_decoders: int = 2) -> tuple[int, ...]:
    """The decoders of a step: all of them if `same_batch`, otherwise that of `decoder_of_step`."""
    if num_decoders == 1:
        return (0,)
    return tuple(range(num_decoders)) if same_batch else (decoder_of_step(step),)


def step_of_rank(
    step: int,
    *,
    rank: int,
    world_size: int,
    num_parts: int,
    same_batch: bool = False,
    num_decoders: int = 2,
    max_encoder_tokens: int | None = None,
) -> StepBatch:
    """A rank's consecutive share of a step's samples, split in the same way on all ranks to stay within the limit."""
    limits = MicroBatchLimits(max_encoder_tokens=max_encoder_tokens)
    decoder_idxs = decoders_of_step(step, same_batch=same_batch, num_decoders=num_decoders)
    parts = {
        decoder_idx: _in_parts(samples_of_step(step, decoder_idx=decoder_idx), world_size * num_parts)
        for decoder_idx in decoder_idxs
    }
    sizes = [sample_sizes(part, POOLING) for part in parts[decoder_idxs[0]]]
    shares = [sizes[first : first + num_parts] for first in range(0, len(sizes), num_parts)]
    splits = split(shares[rank], limits, at_least=planned_splits(shares, limits))
    return StepBatch(
        step=step,
        decoder_idxs=decoder_idxs,
        micro_batches=tuple(
            MicroBatch(
                decoder_idx=decoder_idx,
                batch=pack([parts[decoder_idx][rank * num_parts + one.part_idx][m] for m in one.members], POOLING),
                part_idx=one.part_idx,
            )
            for decoder_idx in decoder_idxs
            for one in splits
        ),
    )


def _in_parts(samples: list[Sample], num_parts: int) -> list[list[Sample]]:
    size = len(samples) // num_parts
    return [samples[first : first + size] for first in range(0, len(samples), size)]


def train_plainly(
    compressor: Compressor,
    decoders: Sequence[Decoder],
    steps: Iterable[int],
    *,
    same_batch: bool = False,
    mean_of_parts: int = 1,
) -> Trajectory:
    """Train on the joined batch of each step. Idle ports do not run and have no gradients (None)."""
    connect_adapters(compressor.ports, decoders)
    groups = tiny_groups(compressor)
    optimizer = torch.optim.AdamW(
        [{"params": list(group.params), "weight_decay": group.weight_decay} for group in groups],
        lr=0.0, betas=BETAS, eps=EPS, foreach=False,
    )  # fmt: skip
    trained = [param for group in groups for param in group.params]
    losses, grad_norms = [], []
    for step in steps:
        for group, torch_group in zip(groups, optimizer.param_groups, strict=True):
            torch_group["lr"] = SCHEDULE.lr(step, group.peak_lr)
        optimizer.zero_grad(set_to_none=True)
        nll_per_label, loss = plain_loss(compressor, decoders, step, same_batch=same_batch, mean_of_parts=mean_of_parts)
        loss.backward()
        grad_norms.append(float(nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)))
        optimizer.step()
        losses.append(nll_per_label.item())
    params = {name: param.detach().clone() for name, param in compressor.named_parameters()}
    return Trajectory(losses=tuple(losses), grad_norms=tuple(grad_norms), params=params)


def plain_loss(
    compressor: Compressor,
    decoders: Sequence[Decoder],
    step: int,
    *,
    same_batch: bool = False,
    mean_of_parts: int = 1,
) -> tuple[Tensor, Tensor]:
    """(mean NLL over the labels of a step's joined batch and all of its decoders, minimised loss), both scalars.

    mean_of_parts: for each decoder, the minimised loss is the mean of the means of this many parts. With 1 and one
        decoder it is the mean over labels.
    """
    nll = []
    for decoder_idx in decoders_of_step(step, same_batch=same_batch, num_decoders=len(decoders)):
        for part in _in_parts(samples_of_step(step, decoder_idx=decoder_idx), mean_of_parts):
            batch = pack(part, POOLING)
            z_ZD = compressor.ports[decoder_idx](compressor.encoder(batch), batch)
            if compressor.bridge is not None:
                z_ZD = compressor.bridge(z_ZD)
            nll.append(decoders[decoder_idx](batch, z_ZD))
    mean = torch.cat(nll).mean()
    if mean_of_parts == 1:
        return mean, mean
    return mean, torch.stack([nll_L.sum() / max(nll_L.numel(), 1) for nll_L in nll]).mean()


def _fill(params: Iterable[nn.Parameter], *, seed: int) -> None:
    """Fill matrices with random values scaled by fan-in, and vectors with values around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in params:
            noise = torch.randn(param.shape, generator=generator)
            param.copy_(noise / param.shape[-1] ** 0.5 if param.shape[0] > 1 and param.ndim > 1 else 1 + 0.1 * noise)

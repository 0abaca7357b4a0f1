"""The training step in plain PyTorch on one process and the joined batch: what DeepSpeed's ranks must agree with.

And the small random models and ragged samples that such comparisons run on; every rank makes the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arc_ds.data.groups import GroupRule
from arc_ds.data.packing import PoolingSpec, pack
from arc_ds.data.segments import Sample, Segment
from arc_ds.data.step_batch import MicroBatch, StepBatch
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.bridge import make_bridge
from arc_ds.model.compressor import Compressor, DecoderPort
from arc_ds.model.decoder import Decoder
from arc_ds.model.encoder import Encoder, PoolingLayout
from arc_ds.model.pooling import GroupPooling
from arc_ds.training.engine import set_trained
from arc_ds.training.optim import ParamGroup, make_param_groups
from arc_ds.training.schedule import RateSchedule

TASKS = ("reconstruction", "continuation")
POOLING = PoolingSpec(rules=(GroupRule("factor", 3),))
MAX_GRAD_NORM = 0.05  # far below the norms of these models, so that every step is clipped
# Clipped gradients are of order 3e-4 an element, and summing in another order leaves noise of up to 5e-10. AdamW
# divides by |g| + eps: with eps 1e-8 an element whose gradient happens to be nil moves by its noise (seen: one of 768
# off by 6e-6, all others by 4e-8), which says nothing of a trainer. At 1e-6 noise moves an element by
# 3e-3 * 5e-10 / 1e-6 at most, 3e-7 of a tensor's norm.
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.95), 1e-6, 0.1
NUM_STEPS = 10
SCHEDULE = RateSchedule(total_steps=NUM_STEPS, warmup_steps=3, initial_lr=1e-6, final_lr=1e-5)

_ENCODER = BackboneConfig(
    family="llama", hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=48,
    vocab_size=97, rope_theta=1e4, norm_eps=1e-5,
)  # fmt: skip
_DECODERS = (
    BackboneConfig(
        family="llama", hidden_size=48, num_layers=3, num_heads=6, num_kv_heads=3, head_dim=8, ffn_size=64,
        vocab_size=61, rope_theta=1e4, norm_eps=1e-5,
    ),
    BackboneConfig(
        family="llama", hidden_size=40, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=10, ffn_size=56,
        vocab_size=83, rope_theta=5e4, norm_eps=1e-6, tie_embeddings=True,
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """What a run leaves: the loss and the gradient norm of each step, and the parameters after the last."""

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    params: dict[str, Tensor]


def tiny_compressor(
    *,
    activation_checkpointing: bool = False,
    trained_layers: int | None = None,
    train_embeddings: bool = True,
) -> Compressor:
    """Three encoder layers of width 32 and a port for each tiny decoder."""
    compressor = bare_compressor(activation_checkpointing=activation_checkpointing)
    _fill(compressor.parameters(), seed=1)
    set_trained(compressor.encoder, trained_layers=trained_layers, train_embeddings=train_embeddings)
    return compressor


def bare_compressor(*, activation_checkpointing: bool = False) -> Compressor:
    """The modules of `tiny_compressor` without its values."""
    encoder = Encoder(
        _ENCODER, num_layers=3, pooling=PoolingLayout(strategy=GroupPooling("mean")),
        activation_checkpointing=activation_checkpointing,
    )  # fmt: skip
    ports = [
        DecoderPort(_ENCODER.hidden_size, make_bridge("mlp", _ENCODER.hidden_size, config.hidden_size, 24))
        for config in _DECODERS
    ]
    return Compressor(encoder, ports)


def tiny_decoders(*, activation_checkpointing: bool = False) -> list[Decoder]:
    """Two decoders of other widths and vocabularies, one with a tied head."""
    decoders = bare_decoders(activation_checkpointing=activation_checkpointing)
    for seed, decoder in enumerate(decoders):
        _fill(decoder.parameters(), seed=10 + seed)
    return decoders


def bare_decoders(*, activation_checkpointing: bool = False) -> list[Decoder]:
    """The modules of `tiny_decoders` without their values."""
    return [Decoder(config, activation_checkpointing=activation_checkpointing) for config in _DECODERS]


def tiny_groups(compressor: Compressor) -> tuple[ParamGroup, ...]:
    """The groups of a tiny compressor, each kind with a rate of its own."""
    return make_param_groups(compressor, encoder_lr=1e-3, bridge_lr=3e-3, markers_lr=2e-3, weight_decay=WEIGHT_DECAY)


def decoder_of_step(step: int) -> int:
    """Which decoder a step takes: one for three steps, then they alternate."""
    return 0 if step < 3 else step % 2


def samples_of_step(step: int, num_sequences: int = 8) -> list[Sample]:
    """Ragged samples of both tasks, with few labels at the start of the batch and many at its end.

    The first half of every fourth step's batch has no label at all.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    vocab_size = _DECODERS[decoder_of_step(step)].vocab_size

    def draw(low: int, high: int, vocab: int) -> list[int]:
        count = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(vocab, (count,), generator=generator).tolist()

    samples = []
    for idx in range(num_sequences):
        in_loss = step % 4 != 3 or idx >= num_sequences // 2
        targets = Segment.text(draw(2, 4 + 2 * idx, vocab_size), in_loss=in_loss)
        marker = "rec" if idx % 3 == 0 else "cont"
        context = Segment.context(draw(1, 14, _ENCODER.vocab_size), marker=marker)
        prefix = Segment.text(draw(0, 5, vocab_size))
        task = TASKS[0] if marker == "rec" else TASKS[1]
        samples.append(Sample(task, (prefix, context, targets)))
    return samples


def step_of_rank(step: int, *, rank: int, world_size: int, num_micro_batches: int) -> StepBatch:
    """The rank's micro-batches of a step's samples, in order."""
    samples = samples_of_step(step)
    size = len(samples) // (world_size * num_micro_batches)
    starts = [(rank * num_micro_batches + micro) * size for micro in range(num_micro_batches)]
    decoder_idx = decoder_of_step(step)
    return StepBatch(
        step=step,
        decoder_idxs=(decoder_idx,),
        micro_batches=tuple(
            MicroBatch(decoder_idx=decoder_idx, batch=pack(samples[start : start + size], POOLING), part_idx=part_idx)
            for part_idx, start in enumerate(starts)
        ),
    )


def train_plainly(compressor: Compressor, decoders: Sequence[Decoder], steps: Iterable[int]) -> Trajectory:
    """Train on the joined batch of each step; a port at rest is not run and its gradients are None."""
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
        loss = plain_loss(compressor, decoders, step)
        loss.backward()
        grad_norms.append(float(nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)))
        optimizer.step()
        losses.append(loss.item())
    params = {name: param.detach().clone() for name, param in compressor.named_parameters()}
    return Trajectory(losses=tuple(losses), grad_norms=tuple(grad_norms), params=params)


def plain_loss(compressor: Compressor, decoders: Sequence[Decoder], step: int) -> Tensor:
    """The mean NLL over the labels of a step's joined batch, scalar."""
    batch = pack(samples_of_step(step), POOLING)
    decoder_idx = decoder_of_step(step)
    z_ZD = compressor.ports[decoder_idx](compressor.encoder(batch), batch)
    return decoders[decoder_idx](batch, z_ZD).mean()


def _fill(params: Iterable[nn.Parameter], *, seed: int) -> None:
    """Matrices by their fan-in, vectors around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in params:
            noise = torch.randn(param.shape, generator=generator)
            param.copy_(noise / param.shape[-1] ** 0.5 if param.shape[0] > 1 and param.ndim > 1 else 1 + 0.1 * noise)

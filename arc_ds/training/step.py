"""One training step: forward and backward of every micro-batch, then the optimizer update.

Shape letters: L labels, D decoders of the step, K tasks, Z compressed vectors, E decoder width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as torch_dist
from torch import Tensor

from arc_ds.batch.packing import PackedBatch
from arc_ds.data.loading.step_batch import MicroBatch, StepBatch
from arc_ds.system import activity
from arc_ds.system.device import start_host_copy
from arc_ds.training.loss import Normalize, class_sums, label_tasks, label_weight, micro_batch_loss
from arc_ds.training.schedule import RateSchedule
from arc_ds.training.spikes import SpikeGuard

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

FrozenDecoder = Callable[[PackedBatch, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Notice:
    """A message from one rank to all ranks. It travels with the label counts, and all ranks act on it after the step.

    stop: this rank received a signal to save and stop.
    failed: this rank has no batch for the next step.
    num_splits: number of micro-batches that this rank splits its share of the next step into; 0 if there is none.
    """

    stop: bool = False
    failed: bool = False
    num_splits: int = 0


NO_NOTICE = Notice()


@dataclass(frozen=True, kw_only=True)
class AllNotices:
    """The notices of all ranks, combined; identical on every rank.

    stop: at least one rank set `stop`.
    failed: at least one rank set `failed`.
    splits: `num_splits` of every rank, in rank order.
    """

    stop: bool
    failed: bool
    splits: tuple[int, ...]

    @property
    def ends_run(self) -> bool:
        """Whether this step is the last one."""
        return self.stop or self.failed


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The result of one step. Tensors stay on the device; the caller decides when to synchronize.

    nll_DK: float64, NLL in nats summed over the labels of the global batch, per decoder of `decoder_idxs` and task.
    labels_DK: int64, number of labels in each of these sums.
    grad_norm: float32 scalar, gradient norm of the global batch before clipping; infinity instead of NaN.
    applied: False if no rank updated anything: the loss or a gradient was not finite on any rank, or there was a spike.
    is_spike: whether the step was not applied because of a spike (`spikes.py`); its loss and norm are finite then.
    learning_rates: learning rate of every parameter group that this step trained, by name.
    notices: of all ranks.
    """

    step: int
    decoder_idxs: tuple[int, ...]
    nll_DK: Tensor
    labels_DK: Tensor
    grad_norm: Tensor
    applied: bool
    is_spike: bool = False
    learning_rates: Mapping[str, float]
    notices: AllNotices

    @property
    def loss(self) -> Tensor:
        """NLL per label of the global batch, float64 scalar."""
        return self.nll_DK.sum() / self.labels_DK.sum().clamp(min=1)


def train_step(
    engine: DeepSpeedEngine,
    decoders: Sequence[FrozenDecoder],
    batch: StepBatch,
    *,
    schedule: RateSchedule,
    tasks: Sequence[str],
    normalize: Normalize = "global",
    notice: Notice = NO_NOTICE,
    spikes: SpikeGuard | None = None,
) -> StepResult:
    """Train on one global batch. Collective.

    All ranks must call it with the same step, the same decoders and the same number of micro-batches. A rank without
    labels still runs its passes because the other ranks wait for them. The host synchronizes with the device once,
    when DeepSpeed checks the gradient norm.

    engine: from `build_engine`.
    decoders: all placed decoders of the run.
    tasks: names of all tasks of the run.
    notice: this rank's message to the other ranks.
    spikes: attached to the engine; None applies every finite step.
    """
    activity.note("label counts", step=batch.step + 1)
    rates = engine.optimizer.optimizer.prepare(schedule, batch.step, batch.decoder_idxs)
    num_classes = len(batch.decoder_idxs) * len(tasks)
    passes, labels_of_part = [], Counter[object]()
    for micro in batch.micro_batches:
        labels_of_part[micro.decoder_idx, micro.part_idx] += micro.batch.num_labels
        on_device = micro.batch.to(engine.device)
        first_class = batch.decoder_idxs.index(micro.decoder_idx) * len(tasks)
        passes.append(_Pass(micro, on_device, first_class + label_tasks(on_device, tasks)))
    labels_C, read_notices = _exchange(notice, [one.class_L for one in passes], num_classes)
    nll_C = torch.zeros(num_classes, dtype=torch.float64, device=labels_C.device)
    for pass_idx, one in enumerate(passes):
        # Set the boundary explicitly: the engine's own counter would be off after an interrupted step.
        engine.set_gradient_accumulation_boundary(pass_idx == len(passes) - 1)
        decoder_idx = one.micro.decoder_idx
        activity.note("encoder", load=_load(pass_idx, passes))
        nll_L = decoders[decoder_idx](one.batch, engine(one.batch, decoder_idx))
        weight = label_weight(
            normalize,
            global_labels=labels_C.sum(),
            part_labels=labels_of_part[decoder_idx, one.micro.part_idx],
            num_parts=len(labels_of_part),
            world_size=torch_dist.get_world_size(),
        )
        activity.note("backward")
        engine.backward(micro_batch_loss(nll_L, weight), scale_wrt_gas=False)
        nll_C += class_sums(nll_L, one.class_L, num_classes)
    activity.note("sum of the losses", load="")
    torch_dist.all_reduce(nll_C)
    if spikes is not None:
        spikes.prepare(batch.decoder_idxs, nll_C.sum() / labels_C.sum().clamp(min=1))
    activity.note("optimizer step")
    engine.step()
    is_spike = spikes is not None and spikes.is_spike
    grad_norm = spikes.grad_norm if spikes is not None and is_spike else engine.get_global_grad_norm()
    return StepResult(
        step=batch.step,
        decoder_idxs=batch.decoder_idxs,
        nll_DK=nll_C.view(-1, len(tasks)),
        labels_DK=labels_C.view(-1, len(tasks)),
        grad_norm=torch.as_tensor(grad_norm, dtype=torch.float32, device=nll_C.device),
        applied=engine.was_step_applied(),
        is_spike=is_spike,
        learning_rates=rates,
        notices=read_notices(),
    )


class _Pass(NamedTuple):
    """A micro-batch and its tensors on the device.

    batch: its content.
    class_L: int64 [L], decoder and task of each label as a single index.
    """

    micro: MicroBatch
    batch: PackedBatch
    class_L: Tensor


def _load(pass_idx: int, passes: Sequence[_Pass]) -> str:
    batch = passes[pass_idx].micro.batch
    return (
        f"micro-batch {pass_idx + 1} of {len(passes)} with {batch.num_encoder_tokens} encoder tokens, "
        f"{batch.num_decoder_rows} decoder rows and {batch.num_labels} labels"
    )


def _exchange(notice: Notice, classes: Sequence[Tensor], num_classes: int) -> tuple[Tensor, Callable[[], AllNotices]]:
    """Sum the label counts and exchange the notices of all ranks in one all-reduce.

    Returns the labels of the global batch by class (int64 [C], on the device) and a function that reads the notices.
    The notices are copied to the host during the step, so reading them after the step does not block. Each rank writes
    its `num_splits` to its own slot; the sum over ranks is therefore the list of all of them.
    """
    class_L = torch.cat(list(classes))
    labels_C = (class_L[:, None] == torch.arange(num_classes, device=class_L.device)).sum(0)
    own = labels_C.new_zeros(2 + torch_dist.get_world_size())  # filled on the device: a host copy could block
    own[0], own[1], own[2 + torch_dist.get_rank()] = int(notice.stop), int(notice.failed), notice.num_splits
    message = torch.cat([labels_C, own])
    torch_dist.all_reduce(message)
    read = start_host_copy(message[num_classes:])

    def notices() -> AllNotices:
        stop, failed, *all_splits = read().tolist()
        return AllNotices(stop=stop > 0, failed=failed > 0, splits=tuple(all_splits))

    return message[:num_classes], notices

"""One training step: micro-batches forward and backward, then the update (design 4, 8).

Shape letters: L labels, D decoders of the step, K tasks, Z compressed vectors, E decoder width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as torch_dist
from torch import Tensor

from arc_ds.batch.packing import PackedBatch
from arc_ds.data.loading.step_batch import MicroBatch, StepBatch
from arc_ds.system.device import start_host_copy
from arc_ds.training.engine import port_optimizer
from arc_ds.training.loss import Normalize, class_sums, label_tasks, label_weight, micro_batch_loss
from arc_ds.training.schedule import RateSchedule

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

FrozenDecoder = Callable[[PackedBatch, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Notice:
    """What one rank knows and all must act on together, after the step: it travels with the count of labels.

    stop: it has been asked to save and stop. failed: it has no batch for the next step. num_splits: into how many
    micro-batches its share of the next step is split, 0 where there is no next step.
    """

    stop: bool = False
    failed: bool = False
    num_splits: int = 0


NOTHING_TO_TELL = Notice()


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """The notices of all ranks, the same on each of them.

    stop, failed: true where they are on one rank. splits: each rank's `num_splits`, in rank order.
    """

    stop: bool
    failed: bool
    splits: tuple[int, ...]

    @property
    def ends_run(self) -> bool:
        """Whether there is to be no further step."""
        return self.stop or self.failed


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step tells of itself. Tensors stay on the device, so that reading them is the reader's choice.

    nll_DK: float64, NLL in nats summed over the labels of the global batch, by decoder (those of `decoder_idxs`) and
    task. labels_DK: int64, their number.
    grad_norm: float32 scalar, of the global batch before clipping; infinite where it is not a number.
    applied: False where the loss or a gradient was not finite on some rank: then no rank has changed anything.
    learning_rates: of the groups that this step trained, by name.
    """

    step: int
    decoder_idxs: tuple[int, ...]
    nll_DK: Tensor
    labels_DK: Tensor
    grad_norm: Tensor
    applied: bool
    learning_rates: Mapping[str, float]
    agreed: Agreed

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
    notice: Notice = NOTHING_TO_TELL,
) -> StepResult:
    """Train on one global batch; a collective, to which all ranks come with the same step, decoders and micro-batches.

    engine: of `build_engine`. decoders: all placed decoders of the run. tasks: names of all tasks of the run.
    notice: what this rank has to tell the others. A rank may have no label; its passes run all the same, since the
    other ranks wait for them. The host waits for the device once, in DeepSpeed's look at the gradient norm.
    """
    rates = port_optimizer(engine).prepare(schedule, batch.step, batch.decoder_idxs)
    passes = [_Pass.of(micro, batch.decoder_idxs, tasks, engine.device) for micro in batch.micro_batches]
    num_classes = len(batch.decoder_idxs) * len(tasks)
    labels_C, read_agreed = _tell(notice, [one.class_L for one in passes], num_classes)
    labels_of_part = Counter[object]()
    for one in passes:
        labels_of_part[one.part] += one.batch.num_labels
    nll_C = torch.zeros(num_classes, dtype=torch.float64, device=labels_C.device)
    for pass_idx, one in enumerate(passes):
        # The boundary is said here, not counted by the engine, which would lose count after an interrupted step.
        engine.set_gradient_accumulation_boundary(pass_idx == len(passes) - 1)
        nll_L = decoders[one.decoder_idx](one.batch, engine(one.batch, one.decoder_idx))
        weight = label_weight(
            normalize,
            global_labels=labels_C.sum(),
            part_labels=labels_of_part[one.part],
            num_parts=len(labels_of_part),
            world_size=torch_dist.get_world_size(),
        )
        engine.backward(micro_batch_loss(nll_L, weight), scale_wrt_gas=False)
        nll_C += class_sums(nll_L, one.class_L, num_classes)
    engine.step()
    torch_dist.all_reduce(nll_C)
    return StepResult(
        step=batch.step,
        decoder_idxs=batch.decoder_idxs,
        nll_DK=nll_C.view(-1, len(tasks)),
        labels_DK=labels_C.view(-1, len(tasks)),
        grad_norm=torch.as_tensor(engine.get_global_grad_norm(), dtype=torch.float32, device=nll_C.device),
        applied=engine.was_step_applied(),
        learning_rates=rates,
        agreed=read_agreed(),
    )


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """A micro-batch on the device. class_L: each label's decoder and task as one index, int64 [L].

    part: the decoder and the part of the rank's share that it belongs to.
    """

    decoder_idx: int
    batch: PackedBatch
    class_L: Tensor
    part: tuple[int, int]

    @staticmethod
    def of(micro: MicroBatch, decoder_idxs: Sequence[int], tasks: Sequence[str], device: torch.device) -> _Pass:
        batch = micro.batch.to(device)
        first_class = decoder_idxs.index(micro.decoder_idx) * len(tasks)
        return _Pass(
            decoder_idx=micro.decoder_idx,
            batch=batch,
            class_L=first_class + label_tasks(batch, tasks),
            part=(micro.decoder_idx, micro.part_idx),
        )


def _tell(notice: Notice, classes: Sequence[Tensor], num_classes: int) -> tuple[Tensor, Callable[[], Agreed]]:
    """One all-reduce: the labels of the global batch by class, int64 [C], on the device; and how to read all notices.

    Their copy to the host runs beside the step, so that reading them after it waits for nothing. Each rank writes its
    `num_splits` in a place of its own, so that their sum is the list of all.
    """
    class_L = torch.cat(list(classes))
    labels_C = (class_L[:, None] == torch.arange(num_classes, device=class_L.device)).sum(0)
    told = labels_C.new_zeros(2 + torch_dist.get_world_size())  # filled on the device: a copy to it could wait
    told[0], told[1], told[2 + torch_dist.get_rank()] = int(notice.stop), int(notice.failed), notice.num_splits
    message = torch.cat([labels_C, told])
    torch_dist.all_reduce(message)
    read = start_host_copy(message[num_classes:])

    def agreed() -> Agreed:
        stop, failed, *all_splits = read().tolist()
        return Agreed(stop=stop > 0, failed=failed > 0, splits=tuple(all_splits))

    return message[:num_classes], agreed

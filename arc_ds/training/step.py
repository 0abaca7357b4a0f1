"""One training step: micro-batches forward and backward, then the update (design 4, 8).

Shape letters: L labels, K tasks, Z compressed vectors, E decoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from arc_ds.data.packing import PackedBatch
from arc_ds.device import start_host_copy
from arc_ds.training.engine import port_optimizer
from arc_ds.training.loss import Normalize, label_tasks, label_weight, micro_batch_loss, task_sums
from arc_ds.training.schedule import RateSchedule

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class StepInput(Protocol):
    """What a step asks of its batch: this rank's micro-batches, and the decoder that all ranks take."""

    @property
    def step(self) -> int: ...

    @property
    def decoder_idx(self) -> int: ...

    @property
    def micro_batches(self) -> Sequence[PackedBatch]: ...


class Notice(NamedTuple):
    """What one rank knows and all must act on together, after the step: it travels with the count of labels.

    stop: it has been asked to save and stop. failed: it has no batch for the next step.
    """

    stop: bool = False
    failed: bool = False


NOTHING_TO_TELL = Notice()


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step tells of itself. Tensors stay on the device, so that reading them is the reader's choice.

    nll_K: float64, NLL in nats summed over the labels of the global batch, by task. labels_K: int64, their number.
    grad_norm: float32 scalar, of the global batch before clipping; infinite where it is not a number.
    applied: False where the loss or a gradient was not finite on some rank: then no rank has changed anything.
    learning_rates: of the groups that this step trained, by name.
    notice: the ranks' notices, the same on all of them: true where it is true on one.
    """

    step: int
    decoder_idx: int
    nll_K: Tensor
    labels_K: Tensor
    grad_norm: Tensor
    applied: bool
    learning_rates: Mapping[str, float]
    notice: Notice

    @property
    def loss(self) -> Tensor:
        """NLL per label of the global batch, float64 scalar."""
        return self.nll_K.sum() / self.labels_K.sum().clamp(min=1)


def train_step(
    engine: DeepSpeedEngine,
    decoder: Callable[[PackedBatch, Tensor], Tensor],
    batch: StepInput,
    *,
    schedule: RateSchedule,
    tasks: Sequence[str],
    normalize: Normalize = "global",
    notice: Notice = NOTHING_TO_TELL,
) -> StepResult:
    """Train on one global batch; a collective, to which all ranks come with the same step and decoder.

    engine: of `build_engine`. decoder: the placed decoder `batch.decoder_idx`. tasks: names of all tasks of the run.
    notice: what this rank has to tell the others. A rank may have no label; its passes run all the same, since the
    other ranks wait for them. The host waits for the device once, in DeepSpeed's look at the gradient norm.
    """
    rates = port_optimizer(engine).prepare(schedule, batch.step, batch.decoder_idx)
    micro_batches = [micro_batch.to(engine.device) for micro_batch in batch.micro_batches]
    task_of_label = [label_tasks(micro_batch, tasks) for micro_batch in micro_batches]
    labels_K, read_notice = _tell(notice, task_of_label, len(tasks))
    nll_K = torch.zeros(len(tasks), dtype=torch.float64, device=labels_K.device)
    for micro_idx, (micro_batch, task_L) in enumerate(zip(micro_batches, task_of_label, strict=True)):
        # The boundary is said here, not counted by the engine, which would lose count after an interrupted step.
        engine.set_gradient_accumulation_boundary(micro_idx == len(micro_batches) - 1)
        nll_L = decoder(micro_batch, engine(micro_batch, batch.decoder_idx))
        weight = label_weight(
            normalize,
            global_labels=labels_K.sum(),
            micro_labels=micro_batch.num_labels,
            num_micro_batches=len(micro_batches),
            world_size=dist.get_world_size(),
        )
        engine.backward(micro_batch_loss(nll_L, weight), scale_wrt_gas=False)
        nll_K += task_sums(nll_L, task_L, len(tasks))
    engine.step()
    dist.all_reduce(nll_K)
    return StepResult(
        step=batch.step,
        decoder_idx=batch.decoder_idx,
        nll_K=nll_K,
        labels_K=labels_K,
        grad_norm=torch.as_tensor(engine.get_global_grad_norm(), dtype=torch.float32, device=nll_K.device),
        applied=engine.was_step_applied(),
        learning_rates=rates,
        notice=read_notice(),
    )


def _tell(notice: Notice, task_of_label: Sequence[Tensor], num_tasks: int) -> tuple[Tensor, Callable[[], Notice]]:
    """One all-reduce: the labels of the global batch by task, int64 [K], on the device; and how to read all notices.

    Their copy to the host runs beside the step, so that reading them after it waits for nothing.
    """
    task_L = torch.cat(list(task_of_label))
    labels_K = (task_L[:, None] == torch.arange(num_tasks, device=task_L.device)).sum(0)
    message = torch.cat([labels_K, *(labels_K.new_full((1,), int(flag)) for flag in notice)])
    dist.all_reduce(message)
    read = start_host_copy(message[num_tasks:])
    return message[:num_tasks], lambda: Notice(*(count > 0 for count in read().tolist()))

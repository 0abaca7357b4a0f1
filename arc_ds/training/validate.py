"""Validation: the share of a text's information for the decoder that its compressed form retains.

Each held-out sample is scored four ways with the same targets: with its compressed context, with no context
("closed"), with the full text ("open"), and with another sample's compressed context ("mismatched"). The gain of a
mismatched context over no context is domain adaptation, not information, so the baseline is the better of the two:

    gap closed = (b - compressed) / (b - open),  b = min(closed, mismatched)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import Tensor

from arc_ds.batch.packing import PackedBatch, PoolingSpec, pack
from arc_ds.batch.segments import Sample
from arc_ds.data.loading.micro_batches import MicroBatchLimits, sample_sizes

Compress = Callable[[PackedBatch, int], Tensor]
Score = Callable[[PackedBatch, Tensor | None], Tensor]


@dataclass(frozen=True, kw_only=True)
class ValidationSet:
    """The held-out samples of one decoder in four forms. Sample i of each list has the same targets."""

    compressed: tuple[Sample, ...]
    mismatched: tuple[Sample, ...]
    closed: tuple[Sample, ...]
    open: tuple[Sample, ...]

    @property
    def ways(self) -> tuple[tuple[Sample, ...], ...]:
        """The four lists."""
        return (self.compressed, self.mismatched, self.closed, self.open)


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """NLL per target token in nats for one task with one decoder."""

    compressed: float
    mismatched: float
    closed: float
    open: float
    num_labels: int

    @property
    def baseline(self) -> float:
        """NLL that the compressed context has to beat."""
        return min(self.closed, self.mismatched)

    @property
    def gap_closed(self) -> float:
        """1: the context is as good as the text; 0: it is useless. NaN if the text itself does not help."""
        room = self.baseline - self.open
        return (self.baseline - self.compressed) / room if room > 0 else float("nan")

    def as_metrics(self, prefix: str) -> dict[str, float]:
        """Flat metrics, `prefix/nll_compressed` and so on."""
        return {
            f"{prefix}/nll_compressed": self.compressed,
            f"{prefix}/nll_mismatched": self.mismatched,
            f"{prefix}/nll_closed": self.closed,
            f"{prefix}/nll_open": self.open,
            f"{prefix}/gap_closed": self.gap_closed,
        }


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """Sums over all ranks, by task.

    nll_K: float64 [K], NLL in nats.
    labels_K: int64 [K], number of labels.
    """

    nll_K: Tensor
    labels_K: Tensor

    def mean(self, task_idx: int) -> float:
        return float(self.nll_K[task_idx]) / max(int(self.labels_K[task_idx]), 1)


@dataclass(frozen=True)
class _Progress:
    """The callbacks of `Validator.run`."""

    on_forward: Callable[[], None]
    is_stopped: Callable[[], bool]


class ValidationStopped(Exception):
    """At least one rank received a stop request. `Validator.run` raises this on all ranks."""


class Validator:
    """Scores the held-out samples with the current compressor. Closed and open scores are computed once and cached.

    Results do not depend on `batch_size` and `limits`.

    sets: one per decoder.
    batch_size: maximum number of samples per forward pass on each rank.
    limits: maximum size of a forward pass; a sample that exceeds it is scored alone.
    """

    def __init__(
        self,
        sets: Sequence[ValidationSet],
        *,
        decoder_names: Sequence[str],
        packing: PoolingSpec,
        batch_size: int,
        limits: MicroBatchLimits,
        device: torch.device,
    ) -> None:
        self.sets = list(sets)
        self.decoder_names = list(decoder_names)
        self.tasks = tuple(sorted({sample.task for each in sets for sample in each.compressed}))
        self._packing = packing
        self._batch_size = batch_size
        self._limits = limits
        self._device = device
        self._without_compressor: dict[int, tuple[_Sums, _Sums]] = {}

    @property
    def num_samples(self) -> int:
        """Number of held-out samples over all decoders. Each sample is scored in several ways."""
        return sum(len(each.compressed) for each in self.sets)

    @property
    def fingerprint(self) -> str:
        """sha256 of all held-out samples; must be equal on all ranks."""
        digest = hashlib.sha256()
        for sample in (sample for each in self.sets for way in each.ways for sample in way):
            segments = [(s.kind, len(s.ids), s.in_loss, s.marker) for s in sample.segments]
            digest.update(repr((sample.task, segments)).encode())
            for segment in sample.segments:
                digest.update(np.asarray(segment.ids, dtype=np.int64).tobytes())
        return digest.hexdigest()

    @property
    def num_forwards(self) -> int:
        """Number of batches that each rank scores in the next `run`."""
        total = 0
        for idx, samples in enumerate(self.sets):
            known = () if idx in self._without_compressor else (samples.closed, samples.open)
            for each in (samples.compressed, samples.mismatched, *known):
                total += -(-len(self._batches(each)) // torch_dist.get_world_size())
        return total

    @torch.no_grad()
    def run(
        self,
        compress: Compress,
        decoders: Sequence[Score],
        on_forward: Callable[[], None] = lambda: None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> dict[str, dict[str, TaskScores]]:
        """Return scores by decoder name and task, identical on every rank. Collective.

        Raises ValidationStopped on all ranks if one of them received a stop request.

        compress: maps (batch, decoder index) to compressed vectors.
        decoders: each maps (batch, vectors) to the NLL of each label.
        on_forward: called after each batch of this rank, `num_forwards` times in total.
        is_stopped: whether this rank received a stop request; called before each batch.
        """
        progress = _Progress(on_forward, is_stopped)
        scores = {}
        for idx, (name, samples, decoder) in enumerate(zip(self.decoder_names, self.sets, decoders, strict=True)):
            if idx not in self._without_compressor:
                self._without_compressor[idx] = (
                    self._sums(samples.closed, decoder, None, progress),
                    self._sums(samples.open, decoder, None, progress),
                )
            closed, opened = self._without_compressor[idx]
            for_decoder = partial(_compress_for, compress, idx)
            compressed = self._sums(samples.compressed, decoder, for_decoder, progress)
            mismatched = self._sums(samples.mismatched, decoder, for_decoder, progress)
            scores[name] = {
                task: TaskScores(
                    compressed=compressed.mean(k),
                    mismatched=mismatched.mean(k),
                    closed=closed.mean(k),
                    open=opened.mean(k),
                    num_labels=int(compressed.labels_K[k]),
                )
                for k, task in enumerate(self.tasks)
            }
        return scores

    def _sums(
        self,
        samples: Sequence[Sample],
        decoder: Score,
        compress: Callable[[PackedBatch], Tensor] | None,
        progress: _Progress,
    ) -> _Sums:
        """Score batches, distributed round-robin. A rank without a batch repeats the last one without counting it."""
        batches = self._batches(samples)
        rank, world_size = torch_dist.get_rank(), torch_dist.get_world_size()
        nll_K = torch.zeros(len(self.tasks), dtype=torch.float64, device=self._device)
        labels_K = torch.zeros(len(self.tasks), dtype=torch.int64, device=self._device)
        for first in range(0, len(batches), world_size):
            self._end_where_stopped(progress)
            mine = first + rank
            chunk = batches[min(mine, len(batches) - 1)]
            batch = pack(chunk, self._packing if compress is not None else PoolingSpec(())).to(self._device)
            nll_L = decoder(batch, None if compress is None else compress(batch))
            if mine < len(batches):
                task_L = self._tasks_of(chunk)[batch.label_sequences]
                nll_K.index_add_(0, task_L, nll_L.double())
                labels_K.index_add_(0, task_L, torch.ones_like(task_L))
            progress.on_forward()
        torch_dist.all_reduce(nll_K)
        torch_dist.all_reduce(labels_K)
        return _Sums(nll_K=nll_K, labels_K=labels_K)

    def _end_where_stopped(self, progress: _Progress) -> None:
        stopped = torch.tensor(int(progress.is_stopped()), device=self._device)
        torch_dist.all_reduce(stopped)
        if stopped.item():
            raise ValidationStopped

    def _batches(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """Group the samples, in order, into batches as large as the limits allow."""
        batches: list[list[Sample]] = []
        encoder_tokens = decoder_rows = 0
        for sample, size in zip(samples, sample_sizes(samples, self._packing), strict=True):
            encoder_tokens += size.encoder_tokens
            decoder_rows += size.decoder_rows
            is_full = not batches or len(batches[-1]) == self._batch_size
            if is_full or not self._limits.allow(encoder_tokens, decoder_rows):
                batches.append([])
                encoder_tokens, decoder_rows = size
            batches[-1].append(sample)
        return batches

    def _tasks_of(self, samples: Sequence[Sample]) -> Tensor:
        return torch.tensor([self.tasks.index(s.task) for s in samples], dtype=torch.int64, device=self._device)


def _compress_for(compress: Compress, decoder_idx: int, batch: PackedBatch) -> Tensor:
    return compress(batch, decoder_idx)

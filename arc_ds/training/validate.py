"""Validation: the share of a text's information for the decoder that its compressed form retains.

Each held-out sample is scored four ways with the same targets: with its compressed context, with no context
("closed"), with the full text ("open"), and with another sample's compressed context ("mismatched"). The gain of a
mismatched context over no context is domain adaptation, not information, so the baseline is the better of the two:

    gap closed = (b - compressed) / (b - open),  b = min(closed, mismatched)
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import Tensor

from arc_ds.batch.packing import PackedBatch, PoolingSpec, pack
from arc_ds.batch.segments import Sample
from arc_ds.data.loading.micro_batches import MicroBatchLimits, sample_sizes

Compress = Callable[..., Tensor]
Score = Callable[[PackedBatch, Tensor | None], Tensor]


class ValidationSet(NamedTuple):
    """The held-out samples of one decoder in four forms. Sample i of each list has the same targets."""

    compressed: tuple[Sample, ...]
    mismatched: tuple[Sample, ...]
    closed: tuple[Sample, ...]
    open: tuple[Sample, ...]


class TaskScores(NamedTuple):
    """NLL per target token in nats for one task with one decoder."""

    compressed: float
    mismatched: float
    closed: float
    open: float

    @property
    def gap_closed(self) -> float:
        """1: the context is as good as the text; 0: it is useless. NaN if the text itself does not help."""
        baseline = min(self.closed, self.mismatched)
        room = baseline - self.open
        return (baseline - self.compressed) / room if room > 0 else float("nan")

    def as_metrics(self, prefix: str) -> dict[str, float]:
        """Flat metrics, `prefix/nll_compressed` and so on."""
        nll = {f"{prefix}/nll_{name}": value for name, value in self._asdict().items()}
        return {**nll, f"{prefix}/gap_closed": self.gap_closed}

    def __str__(self) -> str:
        nll = ", ".join(f"{name} {value:.3f}" for name, value in self._asdict().items())
        return f"{nll} nats per token; gap closed {self.gap_closed:.3f}"


class ValidationStopped(Exception):
    """At least one rank received a stop request. `Validator.run` raises this on all ranks."""


@dataclass(kw_only=True)
class Validator:
    """Scores the held-out samples with the current compressor. Closed and open scores are computed once and cached.

    Results do not depend on `batch_size` and `limits`.

    sets: one per decoder.
    packing: the encoder's pooling.
    batch_size: maximum number of samples per forward pass on each rank.
    limits: maximum size of a forward pass; a sample that exceeds it is scored alone.
    """

    sets: Sequence[ValidationSet]
    packing: PoolingSpec
    batch_size: int
    limits: MicroBatchLimits
    device: torch.device
    _without_compressor: dict[int, tuple[list[float], list[float]]] = field(default_factory=dict, init=False)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that are scored."""
        return tuple(sorted({sample.task for each in self.sets for sample in each.compressed}))

    @property
    def num_samples(self) -> int:
        """Number of held-out samples over all decoders. Each sample is scored in several ways."""
        return sum(len(each.compressed) for each in self.sets)

    @property
    def num_samples_of_tasks(self) -> list[Counter[str]]:
        """Number of held-out samples by task, for each decoder."""
        return [Counter(sample.task for sample in each.compressed) for each in self.sets]

    @property
    def fingerprint(self) -> str:
        """sha256 of all held-out samples; must be equal on all ranks."""
        digest = hashlib.sha256()
        for sample in (sample for each in self.sets for form in each for sample in form):
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
        self, compress: Compress, decoders: Sequence[Score], before_forward: Callable[[], bool]
    ) -> list[dict[str, TaskScores]]:
        """Return each decoder's scores by task, identical on every rank. Collective.

        Raises ValidationStopped on all ranks if one of them received a stop request.

        compress: maps a batch and `decoder_idx` to compressed vectors.
        decoders: each maps (batch, vectors) to the NLL of each label.
        before_forward: called before each batch of this rank, `num_forwards` times in total. Returns whether this rank
            received a stop request.
        """
        scores = []
        for idx, (samples, decoder) in enumerate(zip(self.sets, decoders, strict=True)):
            if idx not in self._without_compressor:
                self._without_compressor[idx] = (
                    self._nll(samples.closed, decoder, None, before_forward),
                    self._nll(samples.open, decoder, None, before_forward),
                )
            for_decoder = partial(compress, decoder_idx=idx)
            compressed = self._nll(samples.compressed, decoder, for_decoder, before_forward)
            mismatched = self._nll(samples.mismatched, decoder, for_decoder, before_forward)
            of_tasks = zip(compressed, mismatched, *self._without_compressor[idx], strict=True)
            scores.append(dict(zip(self.tasks, map(TaskScores._make, of_tasks), strict=True)))
        return scores

    def _nll(
        self,
        samples: Sequence[Sample],
        decoder: Score,
        compress: Callable[[PackedBatch], Tensor] | None,
        before_forward: Callable[[], bool],
    ) -> list[float]:
        """Mean NLL of each task over all ranks, in nats per label.

        Batches are distributed round-robin. A rank without a batch repeats the last one without counting it.
        """
        batches = self._batches(samples)
        rank, world_size = torch_dist.get_rank(), torch_dist.get_world_size()
        nll_K = torch.zeros(len(self.tasks), dtype=torch.float64, device=self.device)
        labels_K = torch.zeros(len(self.tasks), dtype=torch.int64, device=self.device)
        for first in range(0, len(batches), world_size):
            stopped = torch.tensor(int(before_forward()), device=self.device)
            torch_dist.all_reduce(stopped)
            if stopped.item():
                raise ValidationStopped
            mine = first + rank
            chunk = batches[min(mine, len(batches) - 1)]
            batch = pack(chunk, self.packing if compress is not None else PoolingSpec(())).to(self.device)
            nll_L = decoder(batch, None if compress is None else compress(batch))
            if mine < len(batches):
                task_idxs = [self.tasks.index(sample.task) for sample in chunk]
                task_L = torch.tensor(task_idxs, device=self.device)[batch.label_sequences]
                nll_K.index_add_(0, task_L, nll_L.double())
                labels_K.index_add_(0, task_L, torch.ones_like(task_L))
        torch_dist.all_reduce(nll_K)
        torch_dist.all_reduce(labels_K)
        return [nll / max(labels, 1) for nll, labels in zip(nll_K.tolist(), labels_K.tolist(), strict=True)]

    def _batches(self, samples: Sequence[Sample]) -> list[list[Sample]]:
        """Group the samples, in order, into batches as large as the limits allow."""
        batches: list[list[Sample]] = []
        encoder_tokens = decoder_rows = 0
        for sample, size in zip(samples, sample_sizes(samples, self.packing), strict=True):
            encoder_tokens += size.encoder_tokens
            decoder_rows += size.decoder_rows
            is_full = not batches or len(batches[-1]) == self.batch_size
            if is_full or not self.limits.allow(encoder_tokens, decoder_rows):
                batches.append([])
                encoder_tokens, decoder_rows = size
            batches[-1].append(sample)
        return batches

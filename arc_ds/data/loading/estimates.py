"""Estimated sizes of samples, from the token counts in the index. Every rank knows them without making the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from arc_ds.batch.packing import PoolingSpec, num_outputs
from arc_ds.data.loading.micro_batches import SampleSize
from arc_ds.data.tasks import TaskLimits
from arc_ds.data.tasks.registry import task_of_sample
from arc_ds.data.tasks.task import RecordMeans
from arc_ds.shards.format import Manifest


class Estimate(NamedTuple):
    """The estimated size of a sample.

    context_lengths: encoder tokens of each context.
    prefix_rows: decoder rows before the first compressed one; they have no gradient.
    suffix_rows: all other decoder rows.
    """

    context_lengths: tuple[int, ...]
    prefix_rows: int
    suffix_rows: int


def estimated_size(estimate: Estimate, pooling: PoolingSpec) -> SampleSize:
    """The size of a sample as `micro_batches` counts it."""
    tokens = sum(estimate.context_lengths) + pooling.memory_tokens * len(estimate.context_lengths)
    return SampleSize(encoder_tokens=tokens, decoder_rows=estimate.prefix_rows + estimate.suffix_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkRates:
    """The work of a step in one unit, such as FLOPs, forward and backward together.

    The defaults are for an encoder and a frozen decoder of equal size, without attention: trained linears cost three
    forwards, and frozen linears with a gradient cost two.

    encoder_token: one encoder token through the linears of all layers.
    prefix_row: one decoder row without a gradient through the linears of all layers.
    suffix_row: one decoder row with a gradient through the linears of all layers.
    encoder_pair: attention between two tokens of a context.
    decoder_pair: attention between two rows of a sequence.
    """

    encoder_token: float = 3.0
    prefix_row: float = 1.0
    suffix_row: float = 2.0
    encoder_pair: float = 0.0
    decoder_pair: float = 0.0

    def work(self, estimate: Estimate) -> float:
        """The work of one sample."""
        lengths, prefix_rows, suffix_rows = estimate
        rows = prefix_rows + suffix_rows
        return (
            self.encoder_token * sum(lengths)
            + self.encoder_pair * sum([length * length for length in lengths])
            + self.prefix_row * prefix_rows
            + self.suffix_row * suffix_rows
            + self.decoder_pair * rows * rows
        )


def record_means(manifest: Manifest, limits: TaskLimits) -> RecordMeans:
    """The means of fine-tuning shards.

    A sample reads the first 1, 2, … or limits.max_passages passages of a record, with equal probability
    (`tasks.questions`). The passages of a record are assumed to be equally long.
    """
    by_number = manifest.passage_tokens
    in_passages = sum(by_number.values())
    if not in_passages:
        return RecordMeans()
    other_tokens = round((manifest.tokens - in_passages) / manifest.samples)
    drawn = sum(tokens * (1 + min(number, limits.max_passages)) / (2 * number) for number, tokens in by_number.items())
    return RecordMeans(
        other_tokens=other_tokens,
        question_rows=min(other_tokens, limits.max_question + limits.max_answer),
        drawn_share=drawn / in_passages,
    )


class Estimator:
    """Estimates for the samples of one source. A decoder token counts as one encoder token.

    limits: sizes of the source.
    pooling: the encoder's pooling.
    means: means of the source's records if they are fine-tuning records, else None.
    """

    def __init__(self, limits: TaskLimits, pooling: PoolingSpec, means: RecordMeans | None = None) -> None:
        self._limits = limits
        self._pooling = pooling
        self._means = means
        self._compressed: dict[int, int] = {}

    def estimate(self, sample: str, tokens: Sequence[int]) -> Estimate:
        """The estimate of one sample.

        sample: its name, such as "reconstruction".
        tokens: tokens of its own record, then of its in-context examples.
        """
        contexts, before, after = task_of_sample(sample).estimate(sample, tokens, self._limits, self._means)
        return Estimate(
            context_lengths=contexts,
            prefix_rows=int(self._limits.bos) + before,
            suffix_rows=sum(map(self._compressed_rows, contexts)) + after,
        )

    def _compressed_rows(self, length: int) -> int:
        """Compressed rows of a context, including its marker."""
        if length not in self._compressed:
            self._compressed[length] = int(num_outputs(np.array([length]), self._pooling)[0])
        return self._compressed[length] + bool(self._limits.markers)

"""How large a sample will be, from the token counts in the index: known to every rank without making the sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from arc_ds.data.batches.micro_batches import SampleSize
from arc_ds.data.batches.order import Task
from arc_ds.data.batches.packing import PoolingSpec, num_outputs
from arc_ds.data.tasks import TaskLimits

# The index counts a fine-tuning record's tokens in all, so what is asked and the words around it are guessed.
_ASKED_TOKENS = 24
_TEMPLATE_TOKENS = 8


class Estimate(NamedTuple):
    """What a sample will take. context_lengths: encoder tokens of each context. prefix_rows: decoder rows before the
    first compressed one, which no gradient passes through; suffix_rows: all others."""

    context_lengths: tuple[int, ...]
    prefix_rows: int
    suffix_rows: int

    def size(self, pooling: PoolingSpec) -> SampleSize:
        """As `micro_batches` counts it."""
        tokens = sum(self.context_lengths) + pooling.memory_tokens * len(self.context_lengths)
        return SampleSize(encoder_tokens=tokens, decoder_rows=self.prefix_rows + self.suffix_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkRates:
    """The work of a step in one unit, such as FLOPs, forward and backward together.

    encoder_token, prefix_row, suffix_row: one of each through the linears of all layers. encoder_pair, decoder_pair:
    two tokens that attend to each other within a context, two rows within a sequence. The defaults are those of an
    encoder and a frozen decoder of one size with attention left out: what is trained costs three forwards, what a
    gradient passes through two.
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


class Estimator:
    """Estimates for the samples of one source, which count a decoder's token as one of the encoder's.

    Fine-tuning records are taken with all their passages: the index does not tell how many they have and how many will
    be drawn. is_asked: whether the records are of that kind.
    """

    def __init__(self, limits: TaskLimits, pooling: PoolingSpec, *, is_asked: bool) -> None:
        self._limits = limits
        self._pooling = pooling
        self._is_asked = is_asked
        self._compressed = lru_cache(maxsize=1 << 14)(self._count_compressed)

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_compressed"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._compressed = lru_cache(maxsize=1 << 14)(self._count_compressed)

    def estimate(self, task: Task, tokens: Sequence[int]) -> Estimate:
        """tokens: of the sample's own record, then of its in-context examples."""
        if task == "reconstruction":
            return self._reconstruction(tokens[0])
        if task == "continuation":
            return self._continuation(tokens[0])
        if task == "few_shot":
            return self._few_shot(tokens)
        return self._long_context(tokens[0])

    def _reconstruction(self, tokens: int) -> Estimate:
        length = max(min(tokens, self._limits.max_context), 1)
        return Estimate(
            context_lengths=(length,),
            prefix_rows=int(self._limits.bos),
            suffix_rows=self._compressed(length) + length,
        )

    def _continuation(self, tokens: int) -> Estimate:
        limits = self._limits
        total = limits.max_prefix + limits.max_context + limits.max_continuation
        tokens = min(tokens, total)
        prefix = tokens * limits.max_prefix // total
        length = max(tokens * limits.max_context // total, 1)
        return Estimate(
            context_lengths=(length,),
            prefix_rows=prefix + int(limits.bos),
            suffix_rows=self._compressed(length) + max(tokens - prefix - length, 0),
        )

    def _few_shot(self, tokens: Sequence[int]) -> Estimate:
        own, *examples = (max(count - _ASKED_TOKENS, 1) for count in tokens)
        own = min(own, self._limits.max_documents)
        room, kept = self._limits.max_documents - own, 0
        for length in reversed(examples):  # as the task takes them
            room -= length
            if room < 0:
                break
            kept += 1
        lengths = (*examples[len(examples) - kept :], own)
        return Estimate(
            context_lengths=lengths,
            prefix_rows=int(self._limits.bos),
            suffix_rows=sum(map(self._compressed, lengths)) + (_ASKED_TOKENS + _TEMPLATE_TOKENS) * len(lengths),
        )

    def _long_context(self, tokens: int) -> Estimate:
        limits = self._limits
        behind = _ASKED_TOKENS if self._is_asked else min(limits.max_continuation, tokens // 2)
        in_chunks = min(max(tokens - behind, 1), limits.max_chunks * limits.chunk_tokens)
        whole, rest = divmod(in_chunks, limits.chunk_tokens)
        last = (rest,) if rest else ()
        return Estimate(
            context_lengths=(limits.chunk_tokens,) * whole + last,
            prefix_rows=int(limits.bos),
            suffix_rows=whole * self._compressed(limits.chunk_tokens) + sum(map(self._compressed, last)) + behind,
        )

    def _count_compressed(self, length: int) -> int:
        """Compressed rows of a context, its marker included."""
        return int(num_outputs(np.array([length]), self._pooling)[0]) + bool(self._limits.markers)

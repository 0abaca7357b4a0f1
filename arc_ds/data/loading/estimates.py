"""How large a sample will be, from the token counts in the index: known to every rank without making the sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from arc_ds.batch.packing import PoolingSpec, num_outputs
from arc_ds.data.loading.micro_batches import SampleSize
from arc_ds.data.order.order import Task
from arc_ds.data.tasks import TaskLimits
from arc_ds.shards.format import Manifest

_TEMPLATE_TOKENS = 8  # the words around question and answer


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


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedMeans:
    """Means of a source's fine-tuning records, of each of which the index tells the tokens in all.

    other_tokens: those outside its passages. asked_rows: of them, those that a sample keeps. drawn_share: of the
    passages' tokens, the share that a few-shot sample reads. The defaults are guesses for shards that do not tell how
    many passages their records have: all of them are read.
    """

    other_tokens: int = 24
    asked_rows: int = 24
    drawn_share: float = 1.0


def asked_means(manifest: Manifest, limits: TaskLimits) -> AskedMeans:
    """The means of fine-tuning shards.

    A sample reads the first 1, 2, … or limits.max_passages passages of a record, each number as often (`tasks.asked`);
    those of a record count as equally long.
    """
    by_number = manifest.passage_tokens
    in_passages = sum(by_number.values())
    if not in_passages:
        return AskedMeans()
    other_tokens = round((manifest.tokens - in_passages) / manifest.samples)
    drawn = sum(tokens * (1 + min(number, limits.max_passages)) / (2 * number) for number, tokens in by_number.items())
    return AskedMeans(
        other_tokens=other_tokens,
        asked_rows=min(other_tokens, limits.max_question + limits.max_answer),
        drawn_share=drawn / in_passages,
    )


class Estimator:
    """Estimates for the samples of one source, which count a decoder's token as one of the encoder's.

    asked: the means of its records where they are fine-tuning records, else None.
    """

    def __init__(self, limits: TaskLimits, pooling: PoolingSpec, asked: AskedMeans | None = None) -> None:
        self._limits = limits
        self._pooling = pooling
        self._asked = asked
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
            return self._few_shot(tokens, self._asked or AskedMeans())
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

    def _few_shot(self, tokens: Sequence[int], asked: AskedMeans) -> Estimate:
        own, *examples = (max(round((count - asked.other_tokens) * asked.drawn_share), 1) for count in tokens)
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
            suffix_rows=sum(map(self._compressed, lengths)) + (asked.asked_rows + _TEMPLATE_TOKENS) * len(lengths),
        )

    def _long_context(self, tokens: int) -> Estimate:
        limits = self._limits
        asked = self._asked
        behind = min(limits.max_continuation, tokens // 2) if asked is None else asked.asked_rows
        outside = behind if asked is None else asked.other_tokens
        in_chunks = min(max(tokens - outside, 1), limits.max_chunks * limits.chunk_tokens)
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

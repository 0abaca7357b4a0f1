"""Held-out examples: fixed lists, the same on any number of machines (design 12)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np

from arc_ds.data.order import Task, draw_examples
from arc_ds.data.randomness import random_words
from arc_ds.data.reader import Reader
from arc_ds.data.source import Source
from arc_ds.data.tasks import Example, make_example
from arc_ds.data.tokenizers import Tokenizer
from arc_ds.errors import DataError

_MIN_SAMPLES = 2  # of a task: each is compared with another one's context


def validation_examples(
    sources: Sequence[Source], num: int, *, encoder: Tokenizer, readers: Sequence[Reader]
) -> tuple[tuple[Example, ...], ...]:
    """The held-out examples of each decoder, of the same records for all of them; a pure function of its arguments.

    num: samples in all, shared out by the sources' weights, and evenly among a source's tasks; spread evenly over its
    records. Records that cannot be used, or are too short for their task, are passed over. DataError where a source
    has too few that can.
    """
    found: list[list[Example]] = []
    for source_idx, (source, share) in enumerate(zip(sources, _shares(sources, num), strict=True)):
        held_out = _HeldOut(source=source, source_idx=source_idx, encoder=encoder, readers=tuple(readers))
        found += held_out.take(share)
    return tuple(tuple(each) for each in zip(*found, strict=True))


def _shares(sources: Sequence[Source], num: int) -> list[int]:
    """Samples of each source; they sum to `num`."""
    ends = list(accumulate(source.weight for source in sources))
    return np.diff([0, *(round(num * end / ends[-1]) for end in ends)]).tolist()


@dataclass(frozen=True, kw_only=True)
class _HeldOut:
    """One source, and who reads it."""

    source: Source
    source_idx: int
    encoder: Tokenizer
    readers: tuple[Reader, ...]

    def take(self, num: int) -> list[list[Example]]:
        """`num` samples, task by task, each for all decoders."""
        num_records, tasks, most = len(self.source.shards), self.source.tasks, self.source.in_context_examples
        per_task = num // len(tasks)
        if per_task < _MIN_SAMPLES or num_records < num or num_records <= most:
            raise DataError(
                f"{self.source.shards.name}: {num} validation samples ({', '.join(tasks)}) with up to {most} "
                f"in-context examples were asked for; it holds {num_records} records. Ask for "
                f"{_MIN_SAMPLES * len(tasks)} to {num_records} (validation.num_samples, shared out by the sources' "
                "weights), or hold out more records."
            )
        starts = np.linspace(0, num_records, num, endpoint=False).astype(np.int64).tolist()
        used: set[int] = set()
        return [
            self._next_usable(start, task, used)
            for task_idx, task in enumerate(tasks)
            for start in starts[task_idx :: len(tasks)][:per_task]
        ]

    def _next_usable(self, start: int, task: Task, used: set[int]) -> list[Example]:
        """The first record from `start` on that is not in `used` and gives a sample; puts it there."""
        for record_idx in chain(range(start, len(self.source.shards)), range(start)):
            examples = None if record_idx in used else self._examples(record_idx, task)
            if examples is not None:
                used.add(record_idx)
                return examples
        raise DataError(
            f"{self.source.shards.name}: too few records can be used and are long enough for so many validation "
            "samples. Lower validation.num_samples or hold out more records."
        )

    def _examples(self, record_idx: int, task: Task) -> list[Example] | None:
        """A record's example for each decoder, None where it cannot be used or is too short for the task."""
        source = self.source
        seed, *words = random_words(source.in_context_examples + 2, "validation", self.source_idx, record_idx).tolist()
        idxs = (record_idx, *draw_examples(source.shape, record_idx, words))
        try:
            records = [source.shards.record(idx) for idx in idxs]
            examples = [self._example(records, task, seed, reader) for reader in self.readers]
        except DataError:
            return None
        return None if any(example.degraded for example in examples) else examples

    def _example(self, records: Sequence[dict[str, Any]], task: Task, seed: int, reader: Reader) -> Example:
        return make_example(
            records,
            task=task,
            seed=seed,
            encoder=self.encoder,
            decoder=reader.tokenizer,
            limits=self.source.limits,
            layout=reader.layout,
        )

"""Held-out examples: fixed lists, the same on any number of machines (design 12)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, chain, pairwise
from typing import Any

from arc_ds.data.batches.decoder_reader import Reader
from arc_ds.data.batches.order import Task, draw_examples
from arc_ds.data.batches.randomness import random_words
from arc_ds.data.batches.source import Source
from arc_ds.data.records import fine_tuning_record
from arc_ds.data.tasks import NO_COUNTS, Example, make_example
from arc_ds.data.tokenizers import Tokenizer
from arc_ds.errors import DataError

logger = logging.getLogger(__name__)

_MIN_SAMPLES = 2  # of a task: each is compared with another one's context


def validation_examples(
    sources: Sequence[Source], num: int, *, encoder: Tokenizer, readers: Sequence[Reader]
) -> tuple[tuple[Example, ...], ...]:
    """The held-out examples of each decoder, of the same records for all of them; a pure function of its arguments.

    num: samples to share out by the sources' weights, and evenly among a source's tasks, whose shares are rounded down:
    so for each source with an odd share and two tasks one less comes back. They are spread evenly over its records.
    Records that cannot be used, or are too short for their task, are passed over; in-context examples that share a
    passage with the record asked about are left out, since they would give away what it says. What was cut is logged.
    DataError where a source has too few records that can be used.
    """
    found: list[list[Example]] = []
    for source_idx, (source, share) in enumerate(zip(sources, _shares(sources, num), strict=True)):
        held_out = _HeldOut(source=source, source_idx=source_idx, encoder=encoder, readers=tuple(readers))
        found += held_out.take(share)
    _log_cuts(found)
    return tuple(tuple(each) for each in zip(*found, strict=True))


def _shares(sources: Sequence[Source], num: int) -> list[int]:
    """Samples of each source; they sum to `num`."""
    ends = list(accumulate(source.weight for source in sources))
    return [after - before for before, after in pairwise([0, *(round(num * end / ends[-1]) for end in ends)])]


def _log_cuts(found: Sequence[Sequence[Example]]) -> None:
    counts = sum((example.counts for examples in found for example in examples), start=NO_COUNTS)
    if counts:
        words = ", ".join(f"{name} {count}" for name, count in asdict(counts).items() if count)
        logger.info("held-out samples, of all decoders: %d, cut to the limits: %s", sum(map(len, found)), words)


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
        starts = [place * num_records // num for place in range(num)]
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
            records = _without_repeats([source.shards.record(idx) for idx in idxs])
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


def _without_repeats(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A sample's own record, and those of its in-context examples that have none of its passages."""
    own, *others = records
    if not others:
        return [own]
    passages = set(fine_tuning_record(own).passages)
    return [own, *(other for other in others if passages.isdisjoint(fine_tuning_record(other).passages))]

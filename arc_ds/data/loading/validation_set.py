"""Held-out examples: fixed lists, the same on any number of machines."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, chain, pairwise
from typing import Any

from arc_ds.data.loading.decoder_reader import Reader
from arc_ds.data.loading.sample_maker import OnError
from arc_ds.data.loading.source import Source
from arc_ds.data.order.order import draw_examples
from arc_ds.data.order.randomness import random_words
from arc_ds.data.tasks import NO_COUNTS, Example, TooShortError, make_example
from arc_ds.errors import DataError
from arc_ds.shards.records import fine_tuning_record
from arc_ds.tokenizers import Tokenizer

logger = logging.getLogger(__name__)

_MIN_SAMPLES = 2  # per task: each sample is also compared with another one's context


def validation_examples(
    sources: Sequence[Source], num: int, *, encoder: Tokenizer, readers: Sequence[Reader], on_error: OnError
) -> tuple[tuple[Example, ...], ...]:
    """The held-out examples of each decoder, from the same records for all decoders. A pure function.

    Samples are spread evenly over the records of a source. Records too short for their task are skipped. In-context
    examples that share a passage with the sample's own record are left out, because they would reveal its content. The
    log reports skipped records and cuts.

    sources: the held-out sources.
    num: number of samples. They are divided by the sources' weights, and evenly among a source's tasks. Shares of tasks
        are rounded down, so a source with two tasks and an odd share gives one sample less.
    encoder: the encoder's tokenizer.
    readers: tokenizer and layout of each decoder.
    on_error: "stop" raises DataError if a sample's own record or an in-context example cannot be used. "skip" skips the
        sample and names it in the log.

    Raises DataError if a source has too few usable records.
    """
    held_out = [
        _HeldOut(source=source, source_idx=source_idx, encoder=encoder, readers=readers, on_error=on_error)
        for source_idx, source in enumerate(sources)
    ]
    ends = list(accumulate(source.weight for source in sources))
    bounds = [0, *(round(num * end / ends[-1]) for end in ends)]
    shares = [after - before for before, after in pairwise(bounds)]
    found = [examples for each, share in zip(held_out, shares, strict=True) for examples in each.take(share)]
    _log_skips_and_cuts(held_out, found)
    return tuple(zip(*found, strict=True))


def _log_skips_and_cuts(held_out: Sequence[_HeldOut], found: Sequence[Sequence[Example]]) -> None:
    too_short = sum(len(each.too_short) for each in held_out)
    unusable = sum(len(each.unusable) for each in held_out)
    if too_short or unusable:
        logger.info(
            "held-out records skipped: %d too short for their task, %d that cannot be used", too_short, unusable
        )
    counts = sum((example.counts for examples in found for example in examples), start=NO_COUNTS)
    if counts:
        words = ", ".join(f"{name} {count}" for name, count in asdict(counts).items() if count)
        logger.info("held-out samples, of all decoders: %d, cut to the limits: %s", sum(map(len, found)), words)


@dataclass(kw_only=True)
class _HeldOut:
    """One source, its readers, and the fate of its records.

    used: records of samples.
    too_short: records that were too short for a task.
    unusable: records whose sample could not be made, with their in-context examples.
    """

    source: Source
    source_idx: int
    encoder: Tokenizer
    readers: Sequence[Reader]
    on_error: OnError
    used: set[int] = field(default_factory=set)
    too_short: set[int] = field(default_factory=set)
    unusable: set[int] = field(default_factory=set)

    def take(self, num: int) -> list[list[Example]]:
        """`num` samples, task by task, each with one example per decoder."""
        num_records, tasks, most = len(self.source.shards), self.source.tasks, self.source.in_context_examples
        per_task = num // len(tasks)
        if per_task < _MIN_SAMPLES or num_records < num or num_records <= most:
            raise DataError(
                f"{self.source.shards.name}: {num} validation samples ({', '.join(tasks)}) with up to {most} "
                f"in-context examples were requested; it holds {num_records} records. Request "
                f"{_MIN_SAMPLES * len(tasks)} to {num_records} (validation.num_samples, divided by the sources' "
                "weights), or hold out more records."
            )
        starts = [place * num_records // num for place in range(num)]
        return [
            self._next_usable(start, task)
            for task_idx, task in enumerate(tasks)
            for start in starts[task_idx :: len(tasks)][:per_task]
        ]

    def _next_usable(self, start: int, task: str) -> list[Example]:
        """The sample of the first unused record from `start` on that gives one."""
        for record_idx in chain(range(start, len(self.source.shards)), range(start)):
            if record_idx in self.used or record_idx in self.unusable:
                continue
            examples = self._examples(record_idx, task)
            if examples is not None:
                self.used.add(record_idx)
                return examples
        raise DataError(
            f"{self.source.shards.name}: too few usable records for this number of validation samples: "
            f"{len(self.too_short)} are too short for a task, {len(self.unusable)} cannot be used. Lower "
            "validation.num_samples or hold out more records."
        )

    def _examples(self, record_idx: int, task: str) -> list[Example] | None:
        """A record's example for each decoder. None if the record is skipped."""
        source = self.source
        seed, *words = random_words(source.in_context_examples + 2, "validation", self.source_idx, record_idx).tolist()
        idxs = (record_idx, *draw_examples(source.shape, record_idx, words))
        try:
            records = _without_repeats([source.shards.record(idx) for idx in idxs])
            examples = [
                make_example(
                    records,
                    task=task,
                    seed=seed,
                    encoder=self.encoder,
                    decoder=reader.tokenizer,
                    limits=source.limits,
                    layout=reader.layout,
                )
                for reader in self.readers
            ]
            if not any(example.degraded for example in examples):
                return examples
        except TooShortError:
            pass
        except (DataError, ValueError) as error:  # ValueError: an unforeseen text is a fault of the record
            others = f" with the in-context examples {', '.join(map(str, idxs[1:]))}" if idxs[1:] else ""
            fault = DataError(f"{source.shards.name}, held-out record {record_idx}{others}: {error}")
            if self.on_error == "stop":
                raise fault from error
            logger.warning("held-out sample skipped: %s", fault)
            self.unusable.add(record_idx)
            return None
        self.too_short.add(record_idx)
        return None


def _without_repeats(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A sample's own record, and its in-context examples that share no passage with it."""
    own, *others = records
    if not others:
        return [own]
    passages = set(fine_tuning_record(own).passages)
    return [own, *(other for other in others if passages.isdisjoint(fine_tuning_record(other).passages))]

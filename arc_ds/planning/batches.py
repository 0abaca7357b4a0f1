"""The samples that a rank trains on in one step, expected from the config or from the lengths of real records.

Only lengths matter: all token ids are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from arc_ds.batch.packing import PoolingSpec, num_outputs
from arc_ds.batch.segments import Marker, Sample, Segment
from arc_ds.config.schema import RunConfig, SourceConfig
from arc_ds.data.loading.estimates import Estimate, Estimator, estimated_size, record_means
from arc_ds.data.loading.micro_batches import MicroBatchLimits, split
from arc_ds.data.tasks.registry import find_task
from arc_ds.data.tasks.task import NO_CHAT
from arc_ds.planning.sizes import task_limits
from arc_ds.shards.reader import ShardSet

RECORDS_READ = 256
"""Records of a source whose lengths are read; evenly spaced."""


class Kind(NamedTuple):
    """A kind of sample of the run.

    share: share of all samples.
    lengths: lengths of such samples, from short to long; at least one.
    num_labels: labels of one sample at most.
    """

    share: float
    lengths: tuple[Estimate, ...]
    num_labels: int


class MicroBatch(NamedTuple):
    """The largest micro-batch of a rank.

    samples: its samples.
    per_step: number of micro-batches of a step with one decoder.
    """

    samples: tuple[Sample, ...]
    per_step: int


@dataclass(frozen=True, kw_only=True)
class SampleKinds:
    """The kinds of samples of a run.

    kinds: the kinds, with their shares.
    names: names of the samples in metrics.
    origins: for each source, the origin of its lengths in words.
    """

    kinds: tuple[Kind, ...]
    names: tuple[str, ...]
    origins: tuple[str, ...]


def sample_kinds(config: RunConfig, pooling: PoolingSpec, open_shards: Callable[[str], ShardSet | None]) -> SampleKinds:
    """The kinds of samples of a run.

    open_shards: opens a source's shards; None if there are none. The config's largest sizes are used then.
    """
    kinds: list[Kind] = []
    names: dict[str, None] = {}
    origins = []
    total = sum(source.weight for source in config.data.sources)
    for source in config.data.sources:
        shards = open_shards(source.path)
        shares = _shares(config, source)
        names |= dict.fromkeys(find_task(source.task).samples)
        for sample, share in shares.items():
            if shards is None:
                lengths = _largest(config, source, sample, pooling)
            else:
                lengths = _read(config, source, sample, shards, pooling)
            kinds.append(Kind(share * source.weight / total, lengths, _num_labels(config, source)))
        origin = "no usable shards on this machine; the config's largest sizes stand"
        origins.append(f"{source.path}: {origin if shards is None else f'lengths of {len(lengths)} records'}")
    return SampleKinds(kinds=tuple(kinds), names=tuple(names), origins=tuple(origins))


def _shares(config: RunConfig, source: SourceConfig) -> dict[str, float]:
    """The share of each sample name of a source. A share that changes over the run counts with its mean."""
    names = find_task(source.task).samples
    if len(names) == 1:
        return {names[0]: 1.0}
    schedule = config.data.reconstruction_share
    if isinstance(schedule, tuple):
        starts = [start for start, _ in schedule]
        ends = [*starts[1:], config.steps]
        lengths = [max(min(end, config.steps) - start, 0) for start, end in zip(starts, ends, strict=True)]
        mean = sum(length * share for length, (_, share) in zip(lengths, schedule, strict=True)) / config.steps
    else:
        mean = float(schedule)
    return {name: share for name, share in zip(names, (mean, 1 - mean), strict=True) if share > 0}


def _num_labels(config: RunConfig, source: SourceConfig) -> int:
    """Labels of a sample at most: the answer, or the whole text after the context."""
    is_text = "pretraining" in find_task(source.task).record_kinds
    longest = max(config.data.max_context_tokens, config.data.max_continuation_tokens)
    return longest if is_text else config.data.max_answer_tokens


def _largest(config: RunConfig, source: SourceConfig, sample: str, pooling: PoolingSpec) -> tuple[Estimate, ...]:
    """The largest sample that the config allows."""
    task, limits = find_task(source.task), task_limits(config, source)
    if "pretraining" in task.record_kinds:
        text = limits.max_prefix + limits.max_context + limits.max_continuation
        chunks = limits.max_chunks * limits.chunk_tokens + limits.max_continuation
        return (Estimator(limits, pooling).estimate(sample, [max(text, chunks)]),)
    bound = task.largest(limits, source.in_context_examples, NO_CHAT)
    each, rest = divmod(bound.context_tokens, bound.contexts)
    contexts = (each + rest, *[each] * (bound.contexts - 1))
    vectors = int(num_outputs(np.array(contexts), pooling).sum()) + len(contexts) * bool(limits.markers)
    return (Estimate(contexts, int(limits.bos), vectors + bound.text_rows),)


def _read(
    config: RunConfig, source: SourceConfig, sample: str, shards: ShardSet, pooling: PoolingSpec
) -> tuple[Estimate, ...]:
    """Estimates of evenly spaced records, by the length of their sequence. Their neighbours are in-context examples."""
    limits, manifest = task_limits(config, source), shards.manifest
    means = record_means(manifest, limits) if manifest.kind == "fine_tuning" else None
    estimator = Estimator(limits, pooling, means)
    tokens = shards.num_tokens
    places = np.linspace(0, len(tokens) - 1, min(RECORDS_READ, len(tokens))).astype(int)
    span = range(source.in_context_examples + 1)
    found = [
        estimator.estimate(sample, [int(tokens[(place + step) % len(tokens)]) for step in span]) for place in places
    ]
    return tuple(sorted(found, key=lambda estimate: estimate.prefix_rows + estimate.suffix_rows))


def micro_batch(kinds: Sequence[Kind], num_samples: int, config: RunConfig, pooling: PoolingSpec) -> MicroBatch:
    """The micro-batch of a rank whose part of a step has `num_samples` samples.

    Each kind has its share of them, and their lengths are evenly spaced among those of the kind. If the limits of the
    config split a part, the largest piece stands.
    """
    numbers = _apportion([kind.share for kind in kinds], num_samples)
    chosen = [
        (kind.lengths[(2 * place + 1) * len(kind.lengths) // (2 * number)], kind.num_labels)
        for kind, number in zip(kinds, numbers, strict=True)
        for place in range(number)
    ]
    limits = MicroBatchLimits(config.data.max_encoder_tokens, config.data.max_decoder_rows)
    splits = split([[estimated_size(estimate, pooling) for estimate, _ in chosen]], limits)
    marker: Marker | None = "cont" if config.markers.cont else "rec" if config.markers.rec else None
    samples = tuple(_sample(*chosen[place], marker, pooling) for place in splits[0].members)
    return MicroBatch(samples, config.micro_batches * len(splits))


def _apportion(shares: Sequence[float], number: int) -> list[int]:
    """Divide a number by shares; those with the largest remainders are rounded up."""
    exact = [share * number for share in shares]
    found = [int(value) for value in exact]
    order = sorted(range(len(shares)), key=lambda place: (found[place] - exact[place], -shares[place]))
    for place in order[: number - sum(found)]:
        found[place] += 1
    return found


def _sample(lengths: Estimate, num_labels: int, marker: Marker | None, pooling: PoolingSpec) -> Sample:
    contexts = [_zeros(length) for length in lengths.context_lengths]
    vectors = int(num_outputs(np.array(lengths.context_lengths), pooling).sum()) + len(contexts) * (marker is not None)
    text_rows = max(lengths.suffix_rows - vectors, 2)
    labelled = min(num_labels, text_rows - 1)
    between = (text_rows - labelled) // len(contexts)
    segments = [Segment.text(_zeros(lengths.prefix_rows))] if lengths.prefix_rows else []
    for context in contexts:
        segments += [Segment.context(context, marker), Segment.text(_zeros(between))]
    last = text_rows - labelled - between * len(contexts)
    segments += [Segment.text(_zeros(last)), Segment.text(_zeros(labelled), in_loss=True)]
    return Sample("planned", tuple(segments))


def _zeros(length: int) -> np.ndarray:
    return np.zeros(length, dtype=np.int64)

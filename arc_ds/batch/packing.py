"""Packing: samples become one batch of flat tensors, in the DataLoader's workers.

Everything that follows from lengths is decided here, on the host: the start of each group, the decoder row of each
token and compressed vector, and the labelled rows. The training step never reads a length.

Shape letters: T encoder tokens, U encoder rows (tokens and memory slots), G final groups, C contexts, S sequences,
N text tokens, Z compressed vectors (groups, or memory outputs, and markers), M markers, R decoder rows, L labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arc_ds.batch.groups import GroupRule, cumulative, group_sizes
from arc_ds.batch.segments import MARKERS, Sample, Segment


class PoolingSpec(NamedTuple):
    """The encoder's pooling. Memory tokens replace pooling, so `pack` raises ValueError if both are set.

    rules: one rule for each of the last layers.
    memory_tokens: number of memory tokens; 0: none.
    """

    rules: tuple[GroupRule, ...] = (GroupRule("factor", 8),)
    memory_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLevel:
    """One pooling of the batch. The groups of one level are the tokens of the next."""

    group_cu: Tensor  # int32 [G_level + 1], start of each group among the tokens that enter the pooling
    cu_seqlens: Tensor  # int32 [C + 1], start of each context among the groups
    positions: Tensor  # int64 [G_level], 0, 1, … in each context
    max_seqlen: int  # maximum number of groups of a context


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixSplit:
    """The decoder's rows in two parts: those before the first compressed row of their sequence, and all others.

    Rows before a compressed row do not depend on it, so in a frozen decoder the prefix needs no gradient. Every
    sequence has a suffix. A sequence without compressed rows is all suffix.
    """

    prefix_rows: Tensor  # int64 [P], ascending
    prefix_cu_seqlens: Tensor  # int32, boundaries of the prefixes that have a row
    suffix_rows: Tensor  # int64 [Q], ascending
    suffix_cu_seqlens: Tensor  # int32 [S + 1]
    prefix_max_seqlen: int
    suffix_max_seqlen: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """One micro-batch as flat tensors. The decoder reads its sequences end to end, without padding."""

    encoder_ids: Tensor  # int64 [T]
    encoder_cu_seqlens: Tensor  # int32 [C + 1], over encoder rows U
    encoder_positions: Tensor  # int64 [U]
    token_rows: Tensor | None  # int64 [T], rows of the tokens if there are memory slots, else None
    memory_rows: Tensor | None  # int64 [C * memory_tokens], else None
    levels: tuple[PoolLevel, ...]
    output_slots: Tensor  # int64 [G], place of each encoder output among the Z compressed vectors
    marker_slots: Tensor  # int64 [M], place of each marker among the Z compressed vectors
    marker_kinds: Tensor  # int64 [M], index into segments.MARKERS
    decoder_ids: Tensor  # int64 [N]
    decoder_cu_seqlens: Tensor  # int32 [S + 1], over decoder rows R
    decoder_positions: Tensor  # int64 [R]
    text_rows: Tensor  # int64 [N]
    compressed_rows: Tensor  # int64 [Z]
    label_rows: Tensor  # int64 [L]
    labels: Tensor  # int64 [L]
    label_sequences: Tensor  # int64 [L], the sequence of each label
    prefix: PrefixSplit | None  # None if no sequence has a row before its first compressed one
    tasks: tuple[str, ...]  # [S]
    encoder_max_seqlen: int
    decoder_max_seqlen: int

    @property
    def num_encoder_tokens(self) -> int:
        return self.encoder_ids.numel()

    @property
    def num_decoder_rows(self) -> int:
        return self.decoder_positions.numel()

    @property
    def num_labels(self) -> int:
        return self.labels.numel()

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on `device`; asynchronous from pinned memory."""
        return _map_tensors(self, lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory (called by torch's DataLoader)."""
        return _map_tensors(self, lambda t: t.pin_memory())


def pack(samples: Sequence[Sample], spec: PoolingSpec) -> PackedBatch:
    """Lay samples out as one `PackedBatch` (CPU tensors).

    A target is a token of a text segment with `in_loss` if the row before it is a text row of the same sample. That row
    has the token as its label. Rows of compressed tokens predict nothing. Raises ValueError on an empty list.
    """
    if not samples:
        raise ValueError("pack() needs at least one sample")
    if spec.rules and spec.memory_tokens:
        raise ValueError(f"pooling rules {spec.rules} and memory_tokens={spec.memory_tokens} exclude each other")
    contexts = [segment for sample in samples for segment in sample.segments if segment.kind == "context"]
    lengths = np.array([len(context.ids) for context in contexts], dtype=np.int64)
    row_lengths = lengths + spec.memory_tokens
    outputs = num_outputs(lengths, spec)
    kinds = np.array([-1 if c.marker is None else MARKERS.index(c.marker) for c in contexts], dtype=np.int64)
    vectors = outputs + (kinds >= 0)  # compressed vectors of each context, its marker included
    first = vectors.cumsum() - vectors
    first_row = row_lengths.cumsum() - row_lengths
    has_memory = spec.memory_tokens > 0
    return PackedBatch(
        encoder_ids=torch.from_numpy(_joined(contexts)),
        encoder_cu_seqlens=torch.from_numpy(cumulative(row_lengths)),
        encoder_positions=torch.from_numpy(_ranges(row_lengths)),
        token_rows=torch.from_numpy(_rows(first_row, lengths)) if has_memory else None,
        memory_rows=torch.from_numpy(_rows(first_row + lengths, outputs)) if has_memory else None,
        levels=_pool(lengths, spec.rules),
        output_slots=torch.from_numpy(_rows(first, outputs)),
        marker_slots=torch.from_numpy((first + outputs)[kinds >= 0]),
        marker_kinds=torch.from_numpy(kinds[kinds >= 0]),
        encoder_max_seqlen=int(row_lengths.max(initial=0)),
        **_decoder_rows(samples, vectors),
    )


def _pool(lengths: NDArray[np.int64], rules: Sequence[GroupRule]) -> tuple[PoolLevel, ...]:
    """The successive poolings of contexts of the given lengths, int64 [C]."""
    levels = []
    for rule in rules:
        sizes, lengths = group_sizes(lengths, rule)
        levels.append(
            PoolLevel(
                group_cu=torch.from_numpy(cumulative(sizes)),
                cu_seqlens=torch.from_numpy(cumulative(lengths)),
                positions=torch.from_numpy(_ranges(lengths)),
                max_seqlen=int(lengths.max(initial=0)),
            )
        )
    return tuple(levels)


def num_outputs(lengths: NDArray[np.int64], spec: PoolingSpec) -> NDArray[np.int64]:
    """Encoder outputs, without markers, of contexts of the given lengths. Both int64 [C]."""
    if spec.memory_tokens:
        return np.full_like(lengths, spec.memory_tokens)
    for rule in spec.rules:
        lengths = rule.num_groups(lengths)
    return lengths


def _decoder_rows(samples: Sequence[Sample], vectors: NDArray[np.int64]) -> dict[str, Any]:
    """The decoder's fields of the batch. `vectors`: number of compressed vectors of each context, int64 [C]."""
    segments = [segment for sample in samples for segment in sample.segments]
    sequences = np.arange(len(samples)).repeat([len(sample.segments) for sample in samples])
    is_text = np.array([segment.kind == "text" for segment in segments], dtype=bool)
    texts = [segment for segment in segments if segment.kind == "text"]
    text_lengths = np.array([len(text.ids) for text in texts], dtype=np.int64)
    rows = np.empty(len(segments), dtype=np.int64)
    rows[is_text], rows[~is_text] = text_lengths, vectors
    first = rows.cumsum() - rows
    # The first token of a text has no text row before it, unless the text continues another one.
    skipped = np.where(_after_text(sequences, is_text, rows)[is_text], 0, 1)
    in_loss = np.array([text.in_loss for text in texts], dtype=bool)
    targets = np.where(in_loss, np.maximum(text_lengths - skipped, 0), 0)
    target_tokens = _rows(text_lengths.cumsum() - text_lengths + skipped, targets)
    first_text_rows = first[is_text]
    lengths = np.bincount(sequences, weights=rows, minlength=len(samples)).astype(np.int64)
    ids = _joined(texts)
    return {
        "decoder_ids": torch.from_numpy(ids),
        "decoder_cu_seqlens": torch.from_numpy(cumulative(lengths)),
        "decoder_positions": torch.from_numpy(_ranges(lengths)),
        "text_rows": torch.from_numpy(_rows(first_text_rows, text_lengths)),
        "compressed_rows": torch.from_numpy(_rows(first[~is_text], vectors)),
        "label_rows": torch.from_numpy(_rows(first_text_rows + skipped - 1, targets)),
        "labels": torch.from_numpy(ids[target_tokens]),
        "label_sequences": torch.from_numpy(sequences[is_text].repeat(targets)),
        "prefix": _prefix_split(lengths, _prefix_lengths(lengths, sequences[~is_text], first[~is_text])),
        "tasks": tuple(sample.task for sample in samples),
        "decoder_max_seqlen": int(lengths.max(initial=0)),
    }


def _after_text(sequences: NDArray[np.int64], is_text: NDArray[np.bool_], rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the row before each segment is a text row of the same sequence, bool [N]."""
    taken = rows.nonzero()[0]  # an empty text has no row, so no segment follows it
    before, here = taken[:-1], taken[1:]
    found = np.zeros(len(rows), dtype=bool)
    found[here] = is_text[before] & (sequences[here] == sequences[before])
    return found


def _prefix_lengths(
    lengths: NDArray[np.int64], sequences: NDArray[np.int64], first: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Number of rows of each sequence before its first compressed one, 0 if it has none, int64 [S].

    lengths: of the sequences, [S].
    sequences: the sequence of each context, [C].
    first: the first row of each context, [C].
    """
    found = np.zeros_like(lengths)
    owners, first_contexts = np.unique(sequences, return_index=True)
    found[owners] = first[first_contexts] - (lengths.cumsum() - lengths)[owners]
    return found


def _prefix_split(lengths: NDArray[np.int64], prefix_lengths: NDArray[np.int64]) -> PrefixSplit | None:
    """Split the rows in two parts, by the lengths of the sequences and of their prefixes, int64 [S] each."""
    if not prefix_lengths.any():
        return None
    suffix_lengths = lengths - prefix_lengths
    first = np.cumsum(lengths) - lengths
    return PrefixSplit(
        prefix_rows=torch.from_numpy(_rows(first, prefix_lengths)),
        prefix_cu_seqlens=torch.from_numpy(cumulative(prefix_lengths[prefix_lengths > 0])),
        suffix_rows=torch.from_numpy(_rows(first + prefix_lengths, suffix_lengths)),
        suffix_cu_seqlens=torch.from_numpy(cumulative(suffix_lengths)),
        prefix_max_seqlen=int(prefix_lengths.max()),
        suffix_max_seqlen=int(suffix_lengths.max()),
    )


def _map_tensors(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """Apply `move` to every tensor in `value`, also within dataclasses and tuples."""
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, tuple):
        return tuple(_map_tensors(item, move) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: _map_tensors(getattr(value, f.name), move) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **changed)
    return value


def _rows(first: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each i, `counts[i]` consecutive rows from `first[i]`: int64 [sum of counts]."""
    return np.arange(counts.sum()) + (first + counts - counts.cumsum()).repeat(counts)


def _ranges(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """0 … n-1 for each length n, end to end: int64 [sum of lengths]."""
    return _rows(np.zeros_like(lengths), lengths)


def _joined(segments: Sequence[Segment]) -> NDArray[np.int64]:
    ids = [segment.ids.array for segment in segments]
    return np.concatenate(ids, dtype=np.int64) if ids else np.zeros(0, dtype=np.int64)

"""Prompts as a decoder reads them: token ids and vectors. They need no compressor.

Shape letters: B prompts, Z vectors, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from arc_ds.batch.packing import PackedBatch, PoolingSpec, pack
from arc_ds.batch.segments import Sample, Segment, TokenIds

# The rows of a prompt in reading order: token ids, or vectors [m, D].
Rows = Sequence[TokenIds | Tensor]

MAX_ROWS = 16384


def num_rows(prompt: Rows) -> int:
    """Number of the decoder's rows of a prompt."""
    return sum(len(part) for part in prompt)


def joined(prompt: Rows) -> list[TokenIds | Tensor]:
    """The prompt without empty parts, and with adjacent ids as one part."""
    parts: list[TokenIds | Tensor] = []
    for is_ids, group in groupby((part for part in prompt if len(part)), key=lambda part: isinstance(part, TokenIds)):
        members = list(group)
        parts += [TokenIds(np.concatenate([np.asarray(ids) for ids in members]))] if is_ids else members
    return parts


def num_common_rows(prompts: Sequence[Rows]) -> int:
    """Length of the longest common prefix of joined prompts, at least one, that leaves each of them a row.

    Vectors are the same if their values are. Vectors that differ anywhere end the prefix before their first row: those
    of a bidirectional encoder differ in all rows.
    """
    first, *others = prompts
    shortest = min(map(num_rows, prompts))
    return min([shortest - 1, *(num_common(first, other) for other in others)])


def num_common(first: Rows, second: Rows) -> int:
    """Length of the longest common prefix of two joined prompts."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            if not (isinstance(a, Tensor) and isinstance(b, Tensor) and (a is b or torch.equal(a, b))):
                break
            count += len(a)
            continue
        shorter = min(len(a), len(b))
        differ = np.flatnonzero(a.array[:shorter] != b.array[:shorter])
        count += int(differ[0]) if len(differ) else shorter
        if len(differ) or len(a) != len(b):
            break
    return count


def rows_before(prompt: Rows, place: int) -> list[TokenIds | Tensor]:
    """The rows of a prompt before a place."""
    found: list[TokenIds | Tensor] = []
    for part in prompt:
        if place > 0:
            found.append(part[:place])
        place -= len(part)
    return found


def rows_after(prompt: Rows, place: int) -> list[TokenIds | Tensor]:
    """The rows of a prompt from a place on."""
    found: list[TokenIds | Tensor] = []
    for part in prompt:
        if place < len(part):
            found.append(part[max(place, 0) :])
        place -= len(part)
    return found


def pack_rows(prompts: Sequence[Rows], device: torch.device, dtype: torch.dtype) -> tuple[PackedBatch, Tensor | None]:
    """(the batch for a decoder, its vectors [Z, D]; None if there are none).

    The batch has no encoder tokens to read: a vector takes the place of a context of one token without pooling.

    dtype: of the vectors.
    """
    samples = [Sample("rows", tuple(_segment(part) for part in prompt)) for prompt in prompts]
    vectors = [part for prompt in prompts for part in prompt if isinstance(part, Tensor)]
    batch = pack(samples, PoolingSpec(())).to(device)
    return batch, torch.cat([z_ZD.to(device, dtype) for z_ZD in vectors]) if vectors else None


def _segment(part: TokenIds | Tensor) -> Segment:
    if isinstance(part, TokenIds):
        return Segment.text(part)
    return Segment.context(TokenIds(np.zeros(len(part), dtype=np.int64)), None)


def row_batches(lengths: Sequence[int], max_rows: int) -> Iterator[range]:
    """Consecutive batches of sequences whose number times their longest length is at most `max_rows`.

    A longer sequence is a batch of its own.

    lengths: rows of each sequence.
    """
    start, longest = 0, 0
    for end, length in enumerate(lengths):
        longest = max(longest, length)
        if end > start and longest * (end - start + 1) > max_rows:
            yield range(start, end)
            start, longest = end, length
    if lengths:
        yield range(start, len(lengths))

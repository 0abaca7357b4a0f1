"""Packing: the content of each row of encoder and decoder, and the labelled rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from arc_ds.batch.groups import GroupRule
from arc_ds.batch.packing import PackedBatch, PoolingSpec, pack
from arc_ds.batch.segments import MARKERS, Sample, Segment

IDS = st.lists(st.integers(0, 99), max_size=9)
SEGMENTS = st.one_of(
    st.builds(Segment.text, IDS, st.booleans()),
    st.builds(Segment.context, IDS.filter(len), st.sampled_from([*MARKERS, None])),
)
SAMPLES = st.lists(
    st.builds(Sample, st.sampled_from("ab"), st.lists(SEGMENTS, max_size=6).map(tuple)), min_size=1, max_size=4
)
SPECS = st.one_of(
    st.lists(st.integers(1, 9).map(lambda factor: GroupRule("factor", factor)), max_size=2).map(
        lambda rules: PoolingSpec(tuple(rules))
    ),
    st.integers(1, 3).map(lambda slots: PoolingSpec((), slots)),
)
FOURS = PoolingSpec((GroupRule("factor", 4),))


def _sample(*segments: Segment) -> Sample:
    return Sample("a", segments)


def _rows_by_hand(samples: list[Sample], spec: PoolingSpec) -> list[list[tuple[str, int]]]:
    """The expected rows of each sequence: ("text", id), ("output", running number) or ("marker", kind)."""
    outputs, sequences = 0, []
    for one in samples:
        rows: list[tuple[str, int]] = []
        for segment in one.segments:
            if segment.kind == "text":
                rows += [("text", token) for token in segment.ids]
                continue
            count = spec.memory_tokens or len(segment.ids)
            for rule in spec.rules:
                count = -(-count // rule.value)
            rows += [("output", outputs + i) for i in range(count)]
            outputs += count
            if segment.marker is not None:
                rows.append(("marker", MARKERS.index(segment.marker)))
        sequences.append(rows)
    return sequences


def _rows_of(batch: PackedBatch) -> list[tuple[str, int]]:
    """The rows according to the batch. Fails if a row is written twice or never."""
    rows: list[tuple[str, int] | None] = [None] * batch.num_decoder_rows
    compressed = batch.compressed_rows.tolist()
    written = [
        (row, ("text", token)) for row, token in zip(batch.text_rows.tolist(), batch.decoder_ids.tolist(), strict=True)
    ]
    written += [(compressed[slot], ("output", i)) for i, slot in enumerate(batch.output_slots.tolist())]
    kinds = batch.marker_kinds.tolist()
    written += [(compressed[slot], ("marker", kinds[i])) for i, slot in enumerate(batch.marker_slots.tolist())]
    assert len(written) == len(rows)
    for row, what in written:
        assert rows[row] is None, f"row {row} is written twice"
        rows[row] = what
    return rows  # type: ignore[return-value]


@given(SAMPLES, SPECS)
@example([_sample(Segment.context([1, 2, 3]))], FOURS)
@example([_sample(Segment.text([1, 2], in_loss=True))], FOURS)
def test_every_decoder_row_is_written_once_in_reading_order(samples: list[Sample], spec: PoolingSpec) -> None:
    batch, by_hand = pack(samples, spec), _rows_by_hand(samples, spec)
    assert _rows_of(batch) == [row for rows in by_hand for row in rows]
    assert batch.decoder_cu_seqlens.diff().tolist() == [len(rows) for rows in by_hand]
    assert batch.decoder_positions.tolist() == [i for rows in by_hand for i in range(len(rows))]
    assert batch.tasks == tuple(one.task for one in samples)
    assert batch.decoder_max_seqlen == max(len(rows) for rows in by_hand)
    assert batch.decoder_cu_seqlens.dtype == batch.encoder_cu_seqlens.dtype == torch.int32


@given(SAMPLES, SPECS)
@example([_sample(Segment.text([1]), Segment.context([7, 8]), Segment.text([2, 3], in_loss=True))], FOURS)
@example([_sample(Segment.text([1]), Segment.text([]), Segment.text([2], in_loss=True))], FOURS)
@example([_sample(Segment.text([1, 2], in_loss=True)), _sample(Segment.text([3, 4], in_loss=True))], FOURS)
def test_a_label_is_the_next_text_token_of_its_row_and_no_target_is_lost(
    samples: list[Sample], spec: PoolingSpec
) -> None:
    batch = pack(samples, spec)
    wanted, row = [], 0
    for seq_idx, (one, rows) in enumerate(zip(samples, _rows_by_hand(samples, spec), strict=True)):
        in_loss = [flag for s in one.segments if s.kind == "text" for flag in [s.in_loss] * len(s.ids)]
        flags = iter(in_loss)
        for i, (kind, value) in enumerate(rows):
            is_target = kind == "text" and next(flags)
            if is_target and i > 0 and rows[i - 1][0] == "text":
                wanted.append((row + i - 1, value, seq_idx))
        row += len(rows)
    got = zip(batch.label_rows.tolist(), batch.labels.tolist(), batch.label_sequences.tolist(), strict=True)
    assert list(got) == wanted
    assert batch.num_labels == len(wanted)


@given(SAMPLES, SPECS)
def test_encoder_rows_are_the_contexts_and_their_memory_slots(samples: list[Sample], spec: PoolingSpec) -> None:
    batch = pack(samples, spec)
    contexts = [s for one in samples for s in one.segments if s.kind == "context"]
    lengths = [len(c.ids) + spec.memory_tokens for c in contexts]
    assert batch.encoder_ids.tolist() == [token for c in contexts for token in c.ids]
    assert batch.encoder_cu_seqlens.diff().tolist() == lengths
    assert batch.encoder_positions.tolist() == [i for n in lengths for i in range(n)]
    assert batch.encoder_max_seqlen == max(lengths, default=0)
    rows = batch.encoder_cu_seqlens
    assert len(batch.levels) == len(spec.rules)
    for level in batch.levels:
        assert level.group_cu.dtype == level.cu_seqlens.dtype == torch.int32
        # Groups do not cross contexts: the start of each context is also the start of a group.
        assert level.group_cu[level.cu_seqlens].tolist() == rows.tolist()
        counts = level.cu_seqlens.diff().tolist()
        assert level.positions.tolist() == [i for n in counts for i in range(n)]
        assert level.max_seqlen == max(counts, default=0)
        rows = level.cu_seqlens
    if not spec.memory_tokens:
        assert batch.token_rows is None and batch.memory_rows is None
        return
    rows = torch.cat((batch.token_rows, batch.memory_rows)).sort().values
    assert rows.tolist() == list(range(sum(lengths)))
    last = np.cumsum(lengths)
    assert batch.memory_rows.tolist() == [
        int(end) - spec.memory_tokens + i for end in last for i in range(spec.memory_tokens)
    ]


def test_every_tensor_moves_with_the_batch() -> None:
    one = Sample("t", (Segment.text([1, 2]), Segment.context([7, 8])))
    moved = pack([one], PoolingSpec((), memory_tokens=2)).to("meta")
    levelled = pack([one], PoolingSpec()).to("meta")
    for batch in (moved, levelled):
        tensors = [v for name in batch.__slots__ if isinstance(v := getattr(batch, name), torch.Tensor)]
        tensors += [t for level in batch.levels for t in (level.group_cu, level.cu_seqlens, level.positions)]
        assert len(tensors) >= 14
        assert all(t.device.type == "meta" for t in tensors)


def test_no_samples_and_contradictory_specs_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        pack([], PoolingSpec())
    with pytest.raises(ValueError, match="exclude each other"):
        pack([Sample("t", ())], PoolingSpec((GroupRule("factor", 8),), memory_tokens=2))


def test_contexts_without_tokens_and_unknown_markers_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Segment.context([])
    with pytest.raises(ValueError, match="'end'; expected one of"):
        Segment.context([1], marker="end")  # type: ignore[arg-type]

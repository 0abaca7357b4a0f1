"""Token ids: an array that behaves like the tuple of its numbers."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arc_ds.batch.segments import Sample, Segment, TokenIds

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=8)


@given(IDS, IDS, st.slices(8), st.sampled_from([np.int64, np.int32, np.uint32]))
def test_ids_read_as_the_tuple_of_their_numbers(ids: list[int], more: list[int], part: slice, dtype: type) -> None:
    kept = TokenIds(np.array(ids, dtype=dtype))
    assert tuple(kept) == tuple(ids) and all(type(token) is int for token in kept)
    assert len(kept) == len(ids) and bool(kept) == bool(ids)
    assert kept[part] == ids[part] and kept + more == [*ids, *more]
    assert (kept == TokenIds(more)) == (ids == more) == (hash(kept) == hash(TokenIds(more)))
    assert kept == TokenIds(ids) == tuple(ids) and hash(kept) == hash(tuple(ids))
    assert np.asarray(kept).tolist() == ids


def test_segments_of_equal_ids_are_equal_however_these_came() -> None:
    made = [Segment.text(ids) for ids in ([3, 4], (3, 4), range(3, 5), np.array([3, 4], dtype=np.uint32))]
    assert all(segment == made[0] and hash(segment) == hash(made[0]) for segment in made)
    assert made[0] != Segment.text([3, 5]) and made[0] != Segment.context([3, 4])
    assert Segment.text([]).ids == () and Segment.text(made[0].ids).ids is made[0].ids


def test_an_array_is_kept_without_a_copy_and_crosses_to_another_process() -> None:
    ids = np.arange(5)
    assert np.shares_memory(Segment.text(ids).ids.array, ids)
    sample = Sample("continuation", (Segment.text(ids[:2]), Segment.context(ids[2:], "rec")))
    assert pickle.loads(pickle.dumps(sample)) == sample


def test_ids_do_not_compare_with_what_is_no_sequence() -> None:
    assert TokenIds([1]) != 1 and TokenIds([1]) != "1"
    with pytest.raises(IndexError):
        TokenIds([1])[1]

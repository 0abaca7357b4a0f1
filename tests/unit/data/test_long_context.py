"""Long context: a text of any length in equal chunks, each a context of its own."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arc_ds.data.tasks import TaskCounts, closed, mismatched, open_
from arc_ds.errors import DataError
from tests.helpers.written import written
from tests.unit.data.examples import Pair, check_targets, context_ids, example_of, golden_case, text_ids

make = partial(example_of, task="long_context", chunk_tokens=4, max_continuation=4)


def test_text_is_continued_behind_its_chunks(pair: Pair) -> None:
    """The first token of the continuation is input only: no row predicts it."""
    example = make(pair, {"text": "abcdefghijklmnop"})
    assert written(example.sample, *pair) == "<s>⟦abcd<cont>⟧⟦efgh<cont>⟧⟦ijkl<cont>⟧m‹nop›"
    assert written(closed(example), *pair) == "<s>m‹nop›"
    assert written(open_(example), *pair) == "<s>abcdefghijklm‹nop›"
    assert (example.contexts, example.counts) == (("abcd", "efgh", "ijkl"), TaskCounts())


def test_markers_are_optional(pair: Pair) -> None:
    example = make(pair, {"text": "abcdefghijkl"}, markers=frozenset(), bos=False)
    assert written(example.sample, *pair) == "⟦abcd⟧⟦efgh⟧i‹jkl›"


def test_short_text_is_halved(pair: Pair) -> None:
    assert written(make(pair, {"text": "abcdefg"}).sample, *pair) == "<s>⟦abcd<cont>⟧e‹fg›"
    assert written(make(pair, {"text": "abcd"}).sample, *pair) == "<s>⟦ab<cont>⟧c‹d›"
    for text in ("abc", "a"):
        with pytest.raises(DataError, match="min_tokens"):
            make(pair, {"text": text})


def test_window_of_a_long_text_moves_with_the_seed(pair: Pair) -> None:
    text = "ABCDFGHIJKLMNOPQRSTUVWXYZ01"
    windows = {make(pair, {"text": text}, seed=seed, max_chunks=2).contexts for seed in range(40)}
    assert windows == {(text[i : i + 4], text[i + 4 : i + 8]) for i in range(len(text) - 12 + 1)}


def test_passages_are_asked_about_in_chunks(pair: Pair) -> None:
    record = {"passages": ["abcdef", "ghi"], "question": "Which?", "answer": "x"}
    asked = "Question: Which?\nAnswer:‹ x\n\n›"
    example = make(pair, record, max_passages=1)
    assert written(example.sample, *pair) == f"<s>Document: ⟦abcd<cont>⟧⟦ef\ng<cont>⟧⟦hi<cont>⟧\n{asked}"
    assert written(closed(example), *pair) == f"<s>{asked}"
    assert written(open_(example), *pair) == f"<s>Document: abcdef\nghi\n{asked}"
    cut = make(pair, record, max_chunks=1)
    assert written(cut.sample, *pair) == f"<s>Document: ⟦abcd<cont>⟧\n{asked}"
    assert cut.counts == TaskCounts(cut_chunks=2)


def test_mismatched_takes_all_chunks_of_another(pair: Pair) -> None:
    record = {"question": "Which?", "answer": "x"}
    examples = [make(pair, record | {"passage": text}) for text in ("abcdef", "ghi")]
    others = [written(sample, *pair) for sample in mismatched(examples)]
    asked = "Question: Which?\nAnswer:‹ x\n\n›"
    assert others[0] == f"<s>Document: ⟦ghi<cont>⟧\n{asked}"
    assert others[1] == f"<s>Document: ⟦abcd<cont>⟧⟦ef<cont>⟧\n{asked}"


def test_chunks_end_at_characters(pair: Pair) -> None:
    example = make(pair, {"text": "aé北é" * 4}, chunk_tokens=4)
    assert all(len(pair[0].encode(chunk)) <= 4 for chunk in example.contexts)
    assert "aé北é".startswith(example.contexts[0])
    with pytest.raises(DataError, match=r"more than chunk_tokens = 2 tokens\. Raise chunk_tokens"):
        make(pair, {"text": "北" * 9}, chunk_tokens=2)


def test_record_of_neither_kind_is_refused(pair: Pair) -> None:
    with pytest.raises(DataError, match="`passages`"):
        make(pair, {"question": "a"})


@given(
    text=st.text("the sea. \n北é", min_size=1, max_size=120),
    seed=st.integers(0, 2**64 - 1),
    max_chunks=st.integers(1, 5),
    chunk_tokens=st.integers(3, 9),
)
def test_chunks_and_target_are_one_stretch_of_the_text(
    pair: Pair, text: str, seed: int, max_chunks: int, chunk_tokens: int
) -> None:
    sizes = {"max_chunks": max_chunks, "chunk_tokens": chunk_tokens}
    try:
        example = make(pair, {"text": text}, seed=seed, **sizes)
    except DataError:
        window = min(len(pair[0].encode(text)), max_chunks * chunk_tokens + 4)
        assert window < 12  # with fewer, a part may get only half a character
        return
    assert example == make(pair, {"text": text}, seed=seed, **sizes)
    whole = "".join(example.contexts) + pair[1].decode(text_ids(example.sample))
    assert whole in text and pair[1].decode(text_ids(open_(example))) == whole
    contexts = context_ids(example.sample)
    assert 1 <= len(contexts) <= max_chunks
    assert all(len(context) <= chunk_tokens for context in contexts)
    assert all(len(context) > chunk_tokens - 3 for context in contexts[:-1])  # 北 has three tokens
    assert [pair[0].decode(context) for context in contexts] == list(example.contexts)
    check_targets(example)


def test_golden_chunks_of_the_reference_are_segments_of_their_own(golden: Path) -> None:
    """The reference's chunks have the same tokens in the same places. Both cut off the last one at the limit."""
    item, golden_pair = golden_case(golden, "instruct_chunk32")
    record = json.loads((golden / "data" / "inputs" / "instruct.jsonl").read_text().splitlines()[0])
    example = make(golden_pair, record, chunk_tokens=32, max_chunks=3)
    assert context_ids(example.sample) == item["to_embed"][0]["tokens"]
    assert example.counts == TaskCounts(cut_chunks=4)
    kinds = [segment.kind for segment in example.sample.segments]
    assert kinds == ["text", "context", "context", "context", "text", "text"]

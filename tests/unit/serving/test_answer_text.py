"""The pieces of an answer join to its text before a stop, and none holds a part of a stop or of a character."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from arc_ds.inference.generate import Sampling
from arc_ds.serving.generation import AnswerText
from arc_ds.serving.protocol import Delta, Options

END = 999


def decode(ids: list[int]) -> str:
    """Bytes as ids, like a byte-level tokenizer."""
    return bytes(ids).decode("utf-8", "replace")


def run(ids: list[int], **options: Any) -> list[Delta]:
    """The pieces of an answer whose tokens come one by one. It ends at END as at a stop id of the decoder."""
    found: list[Delta] = []
    values = {"max_tokens": 1000, "sampling": Sampling(), **options}
    text = AnswerText(decode, Options(**values), frozenset((7,)), found.append)
    for n in range(1, len(ids) + 1):
        if text.update(ids[: n - 1] if ids[n - 1] == END else ids[:n]):
            break
    return found


texts = st.text("ab\n é北", max_size=30)


@given(texts, st.lists(st.text("ab\né", min_size=1, max_size=4), max_size=3), st.booleans())
def test_pieces_join_to_the_text_before_a_stop(text: str, stops: list[str], skip_space: bool) -> None:
    found = run([*text.encode(), END], stop=tuple(stops), skip_space=skip_space)
    whole = text.removeprefix(" ") if skip_space else text
    # The answer ends as soon as one stop is complete, even if a longer one has begun before it.
    starts = (whole[:n] for n in range(len(whole) + 1))
    read = next((start for start in starts if any(stop in start for stop in stops)), whole)
    expected = read[: min((place for stop in stops if (place := read.find(stop)) >= 0), default=len(read))]
    assert "".join(piece.text for piece in found) == expected
    assert found[-1].finish == "stop" and all(piece.finish is None for piece in found[:-1])
    assert not any("\ufffd" in piece.text for piece in found)


def test_text_comes_as_soon_as_it_can_be_no_stop() -> None:
    pieces = [piece.text for piece in run([*b"xab\ncab\n\ny"], stop=("\n\n",))]
    assert pieces == ["x", "a", "b", "\nc", "a", "b", ""]


def test_an_answer_ends_at_its_length_and_at_a_named_stop() -> None:
    assert run([*b"abcdef"], max_tokens=3)[-1] == Delta("c", 3, "length")
    assert run([97, 98, 7, 99]) == [Delta("a", 1), Delta("b", 2), Delta("", 2, "stop")]
    assert run([END]) == [Delta("", 0, "stop")]
    incomplete = run([0xE5, 0x8C, 0x97, 0xE5], max_tokens=4)
    assert [piece.text for piece in incomplete] == ["北", "\ufffd"], "what has begun is shown at the end"

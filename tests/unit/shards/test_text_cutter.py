"""Cutting texts: no text is lost, every piece fits, and cuts are at natural breaks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arc_ds.errors import DataError
from arc_ds.shards.building.text_cutter import TextCutter
from arc_ds.tokenizers import Tokenizer, load_tokenizer
from tests.helpers.tiny_data import TEXT, write_tiktoken


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tiktoken(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"))


@given(
    text=st.text(alphabet="ab. \n\té北🚲", min_size=1, max_size=300),
    max_tokens=st.integers(8, 40),
)
def test_pieces_joined_are_the_text_and_fit(tokenizer: Tokenizer, text: str, max_tokens: int) -> None:
    cutter = TextCutter(tokenizer=tokenizer, max_tokens=max_tokens, min_tokens=2)
    pieces = list(cutter.cut(text))
    assert "".join(piece for piece, _ in pieces) == text
    for piece, num_tokens in pieces:
        assert 0 < num_tokens <= max_tokens
        assert len(tokenizer.encode(piece)) == num_tokens


def test_long_text_is_cut_across_blocks_without_loss(tokenizer: Tokenizer) -> None:
    text = TEXT * 900  # about 190,000 characters: more than one block
    pieces = list(TextCutter(tokenizer=tokenizer, max_tokens=256, min_tokens=16).cut(text))
    assert "".join(piece for piece, _ in pieces) == text
    assert all(16 <= num_tokens <= 256 for _, num_tokens in pieces)
    assert sum(num_tokens for _, num_tokens in pieces) / len(pieces) > 128


def test_cuts_fall_at_paragraphs_and_sentences(tokenizer: Tokenizer) -> None:
    sentence = "Each block was marked with a number. "
    pieces = [p for p, _ in TextCutter(tokenizer=tokenizer, max_tokens=80, min_tokens=8).cut(sentence * 30)]
    assert all(piece.rstrip().endswith("number.") for piece in pieces)
    paragraphs = (sentence * 2 + "\n\n") * 9
    pieces = [p for p, _ in TextCutter(tokenizer=tokenizer, max_tokens=75, min_tokens=8).cut(paragraphs)]
    assert all(piece.startswith("Each") for piece in pieces)
    assert all(piece.endswith("\n\n") for piece in pieces)


def test_character_of_more_tokens_than_allowed_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="Raise max_tokens"):
        list(TextCutter(tokenizer=tokenizer, max_tokens=2, min_tokens=1).cut("🚲🚲"))

"""Scripts: adjacent words are tokenised together, and variants keep the target."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from arc_ds.batch.segments import Segment, TokenIds
from arc_ds.data.tasks import TaskLimits, closed, open_
from arc_ds.data.tasks.chat import PLAIN
from arc_ds.data.tasks.example import ExampleSpec, script_example
from arc_ds.data.tasks.script import Document, Special, Words, render, with_spaces_in_targets
from arc_ds.tokenizers import Tokenizer, load_tokenizer, read_together
from tests.helpers.tiny_data import write_json_tokenizer, write_tiktoken

TEXTS = st.text(alphabet="the sea:. \n北🚲é1", max_size=24)


@pytest.fixture(scope="module", params=["tiktoken", "json", "sp384.model", "sp512.model"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "tiktoken":
        return load_tokenizer(write_tiktoken(folder / "t.model"))
    if request.param == "json":
        return load_tokenizer(write_json_tokenizer(folder / "json"))
    return load_tokenizer(request.getfixturevalue("golden") / "tokenizers" / request.param)


@given(texts=st.lists(TEXTS, min_size=1, max_size=4), inside=st.booleans())
@example(texts=["", " ", "h"], inside=False)
def test_pieces_read_together_spell_the_text(tokenizer: Tokenizer, texts: list[str], inside: bool) -> None:
    pieces = read_together(tokenizer, texts, inside=inside)
    ids = [token for piece in pieces for token in piece]
    assert len(pieces) == len(texts)
    assert all(len(piece) == 0 for piece, text in zip(pieces, texts, strict=True) if not text)
    if inside:
        assert tokenizer.decode([*tokenizer.encode("a"), *ids]) == "a" + "".join(texts)
    else:
        assert tokenizer.decode(ids) == "".join(texts)


def test_pieces_are_slices_of_the_whole_where_tokens_allow(tokenizer: Tokenizer) -> None:
    prompt, answer = "Answer:", " the sea"
    pieces = read_together(tokenizer, [prompt, answer], inside=False)
    assert [*pieces[0], *pieces[1]] == tokenizer.encode(prompt + answer)
    assert pieces[0].tolist() == tokenizer.encode(prompt)


def test_token_across_a_border_is_taken_apart(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tiktoken(tmp_path / "t.model"))
    assert len(tokenizer.encode("the")) == 1
    pieces = [piece.tolist() for piece in read_together(tokenizer, ["t", "he"], inside=False)]
    assert pieces == [tokenizer.encode("t"), tokenizer.encode("he")]


def test_space_in_front_of_a_target_goes_into_it(tokenizer: Tokenizer) -> None:
    parts = with_spaces_in_targets([Special((1,)), Words("Answer: "), Words("the sea", in_loss=True)])
    assert parts == (Special((1,)), Words("Answer:"), Words(" the sea", in_loss=True))
    rendered = render(parts, tokenizer)
    prompt, target = read_together(tokenizer, ["Answer:", " the sea"], inside=False)
    assert rendered.prompt == (Segment.text([1, *prompt]),)
    assert rendered.target == (Segment.text(target, in_loss=True),)


def test_first_token_behind_a_document_is_no_target(tokenizer: Tokenizer) -> None:
    parts = (Document(TokenIds((5, 6)), "xy", "cont"), Words("the sea of stone", in_loss=True))
    rendered = render(parts, tokenizer)
    (ids,) = read_together(tokenizer, ["the sea of stone"], inside=True)
    assert rendered.prompt == (Segment.context((5, 6), "cont"),)
    assert rendered.target == (Segment.text(ids[:1]), Segment.text(ids[1:], in_loss=True))


def test_special_token_ends_a_text(tokenizer: Tokenizer) -> None:
    rendered = render([Words("the"), Special((2,)), Words("the")], tokenizer)
    alone = tokenizer.encode("the")
    assert rendered.prompt == (Segment.text([*alone, 2, *alone]),)
    assert rendered.target == ()


def test_variants_leave_out_or_spell_the_document(tokenizer: Tokenizer) -> None:
    parts = (
        Words("Document: ", with_context=True),
        Document(TokenIds((5, 6)), "the sea", "cont"),
        Words("\n", with_context=True),
        Words("Answer: "),
        Words("of stone", in_loss=True),
    )
    spec = ExampleSpec("few_shot", 0, tokenizer, tokenizer, TaskLimits(), PLAIN)
    example = script_example(parts, (), spec)
    (target,) = (segment for segment in example.sample.segments if segment.in_loss)
    assert closed(example).segments == (Segment.text(tokenizer.encode("Answer:")), target)
    assert open_(example).segments == (Segment.text(tokenizer.encode("Document: the sea\nAnswer:")), target)

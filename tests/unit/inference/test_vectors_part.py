"""`Vectors` stand for contexts that were compressed before, and `nll` is the likelihood of an answer after a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from arc_ds import ArcModel, Context, Segment, Vectors
from arc_ds.errors import ConfigError, DataError, TokenizerError
from arc_ds.inference.generate import Continuation
from arc_ds.inference.reader import DecoderReader
from arc_ds.tokenizers import load_tokenizer
from tests.helpers.tiny_data import write_tiktoken
from tests.helpers.tokenizer_files import KEEPS_TEXT, sentencepiece_model

TEXT, OTHER = "The wind came from the sea.", "A lamp of stone, and a tower that was taken down again."
PROMPTS: list[Any] = [
    ["Document: ", Context(TEXT), "\nAnswer:"],
    ["Document: ", Context(TEXT), "\nDocument: ", Context(OTHER, "rec"), " of the"],
    ["Document: ", Context(OTHER)],
]


def stored(model: ArcModel, prompts: Sequence[Any]) -> list[list[Any]]:
    """The prompts with vectors in place of contexts."""
    return [
        [Vectors(model.compress([p.text], marker=p.marker)[0]) if isinstance(p, Context) else p for p in prompt]
        for prompt in prompts
    ]


def test_vectors_are_read_like_their_contexts(model: ArcModel) -> None:
    with_vectors = stored(model, PROMPTS)
    assert model.generate(with_vectors, max_new_tokens=12) == model.generate(PROMPTS, max_new_tokens=12)
    for ours, theirs in zip(model.prompt_embeds(with_vectors), model.prompt_embeds(PROMPTS), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    answers = [" the sea", " wind", " stone"]
    for ours, theirs in zip(model.nll(with_vectors, answers), model.nll(PROMPTS, answers), strict=True):
        assert ours.tokens == theirs.tokens > 0 and ours.nats == pytest.approx(theirs.nats, rel=1e-4)
    negated = [[Vectors(-p.vectors) if isinstance(p, Vectors) else p for p in prompt] for prompt in with_vectors]
    assert model.generate(negated, max_new_tokens=12) != model.generate(PROMPTS, max_new_tokens=12)


def test_vectors_stand_between_segments_too(model: ArcModel) -> None:
    ids = [3, 11, 19, 27, 4]
    (vectors,) = model.compress([ids])
    text, context = [Segment.text([5, 6]), Segment.text([7])], Segment.context(ids)
    given: list[Any] = [[text[0], Vectors(vectors), text[1]]]
    expected: list[Any] = [[text[0], context, text[1]]]
    torch.testing.assert_close(model.logits(given)[0], model.logits(expected)[0], rtol=0, atol=1e-5)
    assert model.generate_ids(given, max_new_tokens=9) == model.generate_ids(expected, max_new_tokens=9)
    with pytest.raises(DataError, match=r"a prompt has Vectors, which have no tokens"):
        model.segments(given[0])


def test_equal_contexts_are_compressed_once(model: ArcModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contexts are equal if their tokens and their markers are."""
    seen: list[int] = []
    forward = type(model.compressor).forward

    def recorded(self: Any, batch: Any, decoder_idx: int = 0) -> torch.Tensor:
        seen.append(len(batch.tasks))
        vectors: torch.Tensor = forward(self, batch, decoder_idx)
        return vectors

    monkeypatch.setattr(type(model.compressor), "forward", recorded)
    model.generate([*PROMPTS, *PROMPTS], max_new_tokens=1)
    assert seen == [3]


def test_the_nll_is_that_of_the_logits_of_prompt_and_answer(model: ArcModel) -> None:
    tokenizer = model.decoder_tokenizers[0]
    assert tokenizer is not None
    answers = [" the sea", " wind", " stone"]
    for prompt, answer, found in zip(PROMPTS, answers, model.nll(PROMPTS, answers), strict=True):
        segments, whole = model.segments(prompt), model.segments([*prompt, answer])
        ids = [idx for segment in whole if segment.kind == "text" for idx in segment.ids]
        before = sum(len(segment.ids) for segment in segments if segment.kind == "text")
        assert found.tokens == len(ids) - before
        if segments[-1].kind == "text":  # otherwise the first token is predicted by a compressed row
            log_probs = model.logits([whole])[0].log_softmax(dim=-1)
            expected = -sum(float(log_probs[place - 1, ids[place]]) for place in range(before, len(ids)))
            assert found.nats == pytest.approx(expected, rel=1e-4)
    assert model.nll([], []) == [] and model.nll(["a"], [""]) == [(0.0, 0)]


def test_a_reader_without_compressor_is_the_decoder_of_the_model(folder: Path, model: ArcModel) -> None:
    reader = DecoderReader.open(folder / "decoder")
    prompts = ["Text: ", "The wind came"]
    assert [a.text for a in reader.generate(prompts, max_new_tokens=9)] == model.generate(prompts, max_new_tokens=9)
    assert reader.nll(prompts, [" of", " from the sea"]) == model.nll(prompts, [" of", " from the sea"])
    own = reader.generate(prompts, max_new_tokens=[2, 5])
    assert [len(a.ids) for a in own] == [2, 5] and [a.stop for a in own] == ["length", "length"]
    text = model.generate(["Text: "], max_new_tokens=9)[0]
    (cut,) = reader.generate(["Text: "], max_new_tokens=9, stop=[text[3:5]])
    assert (
        cut.text == text[: text.index(text[3:5])] and cut.stop == "string" and cut.raw.startswith(cut.text + text[3:5])
    )


def test_wrong_prompts_and_answers_are_one_clear_error(folder: Path, model: ArcModel) -> None:
    reader = DecoderReader.open(folder / "decoder")
    calls: list[tuple[Any, Any, str]] = [
        (lambda: reader.generate([["a", Context("b")]]), DataError, "of str and Vectors; got a Context"),
        (lambda: model.nll(["a", "b"], [" c"]), DataError, "2 prompts and 1 answers were given"),
        (lambda: model.nll(["a"], "c"), DataError, "answers is one str; expected a list"),
        (lambda: model.nll(["a"], [" c"], decoder=1), ConfigError, "loaded with 1 of its"),
        (
            lambda: model.generate([[Vectors(torch.zeros(2, 5))]]),
            DataError,
            r"have shape \[2, 5\]; decoder 0 reads \[m, 48\]",
        ),
        (lambda: model.generate(["a"], max_new_tokens=[1, 2]), ConfigError, "2 limits for 1 prompts"),
        (lambda: model.generate(["a"], max_new_tokens=[-1]), ConfigError, "max_new_tokens is -1"),
    ]
    for call, kind, message in calls:
        with pytest.raises(kind, match=message):
            call()
    reader.tokenizer = None
    with pytest.raises(TokenizerError, match="the decoder was loaded without a tokenizer"):
        reader.generate(["a"])


SPOKEN = "a 🙂 zwölf 北京\n\nend of the sea, the sea"


@pytest.mark.parametrize("kind", ["json", "tiktoken", "sentencepiece"])
def test_an_answer_ends_at_the_token_that_completes_a_stop(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the stop begins or ends within a token, or a token ends within one of its characters."""
    makers: dict[str, Callable[[], Path]] = {
        "json": lambda: folder / "decoder",
        "tiktoken": lambda: write_tiktoken(tmp_path / "tokenizer.model"),
        "sentencepiece": lambda: sentencepiece_model(tmp_path, **KEEPS_TEXT),
    }
    tokenizer = load_tokenizer(makers[kind]())
    reader = DecoderReader.open(folder / "decoder")
    reader.tokenizer = tokenizer
    ids = tokenizer.encode(SPOKEN)
    assert any("\ufffd" in tokenizer.decode([token]) for token in ids)

    def scripted(_prompts: Any, *, has_ended: Any, **_: Any) -> list[Continuation]:
        num = next((num for num in range(1, len(ids) + 1) if has_ended(0, ids[:num])), len(ids))
        return [Continuation(ids[:num], "string")]

    monkeypatch.setattr(reader, "continue_rows", scripted)
    for start in range(len(SPOKEN)):
        for stop in {SPOKEN[start : start + size] for size in (1, 2, 7, 20)}:
            (answer,) = reader.answer_rows([], max_new_tokens=99, stop=["nowhere", stop])
            assert answer.text == SPOKEN[: SPOKEN.index(stop)] and stop in answer.raw
            assert stop not in tokenizer.decode(answer.ids[:-1])

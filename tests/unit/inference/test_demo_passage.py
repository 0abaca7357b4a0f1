"""The demo's passage: NLL of its tokens under four conditions, and the tokens that the vectors made likely."""

from __future__ import annotations

import torch

from arc_ds import ArcModel
from arc_ds.demo.passage import PassageNll, score_passage


def reading() -> PassageNll:
    def nll(*probabilities: float) -> torch.Tensor:
        return -torch.tensor(probabilities).log()

    return PassageNll(
        tokens=["The", " tower", " is", " stone"],
        nll={"nothing": nll(0.1, 0.9, 0.2), "its vectors": nll(0.8, 0.9, 0.4), "its text": nll(0.9, 0.9, 0.9)},
    )


def test_learned_tokens_are_likely_with_the_vectors_and_not_without() -> None:
    assert reading().learned == [False, True, False, False]


def test_the_line_marks_them_with_and_without_colours() -> None:
    assert reading().line(colour=False) == "The[ tower] is stone"
    assert "\x1b[1;32m tower\x1b[0m" in reading().line(colour=True)


def test_the_tokens_spell_the_passage_also_if_several_share_a_character(model: ArcModel) -> None:
    passage = "The 🚲 held."
    scored = score_passage(model, passage, "A lamp.")
    assert len(scored.tokens) == len(model.decoder_tokenizers[0].encode(passage)) > 8
    assert "".join(scored.tokens) == passage and "\ufffd" not in scored.tokens

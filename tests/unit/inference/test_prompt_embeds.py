"""`prompt_embeds` gives the rows that `generate` reads, so that another engine continues them with the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arc_ds import ArcModel, Context, Segment
from arc_ds.errors import ConfigError, DataError
from tests.helpers.transformers_generate import continue_rows

TEXT, OTHER = "The wind came from the sea.", "A lamp of stone, and a tower that was taken down again."
PROMPTS = [
    ["Document: ", Context(TEXT), "\nAnswer:"],
    ["Each block: ", Context(OTHER), Context(TEXT, "rec"), " of the"],
    "The lighthouse",
    Context(OTHER),
]


def test_transformers_continues_the_rows_with_the_tokens_of_generate(folder: Path, model: ArcModel) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "decoder").eval()
    rows = model.prompt_embeds(PROMPTS)
    assert len({len(line) for line in rows}) > 2, "a batch of equal lengths needs no padding"
    ours = model.generate_ids([model.segments(prompt) for prompt in PROMPTS], max_new_tokens=64)
    assert continue_rows(theirs, rows, 64) == ours
    assert len({tuple(line) for line in ours}) == len(PROMPTS) and len(set(ours[0])) > 3
    without = [torch.cat([line[:-2], line[-1:]]) for line in rows]  # a vector or token less
    assert continue_rows(theirs, without, 64) != ours


def test_rows_are_token_embeddings_and_vectors_in_reading_order(model: ArcModel) -> None:
    (rows,), (vectors,) = model.prompt_embeds([PROMPTS[0]]), model.compress([TEXT])
    table = model.decoders[0].tok_embeddings.weight
    before, context, after = (segment.ids for segment in _without_bos(model))
    assert torch.equal(rows[0], table[0])
    assert torch.equal(rows[1 : 1 + len(before)], table[list(before)])
    torch.testing.assert_close(rows[1 + len(before) : -len(after)], vectors, rtol=0, atol=1e-6)
    assert len(context) > len(vectors) and torch.equal(rows[-len(after) :], table[list(after)])


def _without_bos(model: ArcModel) -> list[Segment]:
    bos, *rest = model.segments(PROMPTS[0])
    assert list(bos.ids) == [0]
    return rest


def test_the_embedding_table_alone_gives_the_same_rows(folder: Path, model: ArcModel) -> None:
    decoder = folder / "decoder"
    alone = ArcModel.from_checkpoint(folder / "export", decoders=[decoder], decoder_parts="embedding")
    for ours, expected in zip(alone.prompt_embeds(PROMPTS), model.prompt_embeds(PROMPTS), strict=True):
        assert torch.equal(ours, expected)
    loaded = [name for name, parameter in alone.decoders[0].named_parameters() if not parameter.is_meta]
    assert loaded == ["tok_embeddings.weight"]
    for use in (lambda: alone.generate(PROMPTS), lambda: alone.logits([[Segment.text([1])]])):
        with pytest.raises(ConfigError, match="only the decoder's embedding table was loaded"):
            use()


def test_one_text_in_place_of_a_list_is_refused(model: ArcModel) -> None:
    with pytest.raises(DataError, match="prompts is one str"):
        model.prompt_embeds("text")
    assert model.prompt_embeds([]) == []

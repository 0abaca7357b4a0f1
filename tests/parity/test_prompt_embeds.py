"""The real SmolLM2: `transformers` continues `prompt_embeds` with the tokens of `ArcModel.generate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from arc_ds import ArcModel, Context
from arc_ds.export.formats import write_export
from tests.helpers.tiny_export import tiny_trained
from tests.helpers.transformers_generate import continue_rows

NUM_TOKENS = 64
TEXT = "The wind came from the sea. A lamp of stone stood in the tower."
PROMPTS = [
    ["Document: ", Context(TEXT), "\nQuestion: What is the capital of France?\nAnswer:"],
    ["The capital of France is"],
    [Context(TEXT), Context("Each block was marked."), "Mr. Speaker, Mr. Vice President, members of Congress:"],
]


@pytest.mark.slow
def test_smollm2_continues_the_rows_with_the_tokens_of_generate(smollm2, tmp_path: Path) -> None:
    source, theirs = smollm2
    trained = tiny_trained(tmp_path / "run", decoder_sizes=(source.config.hidden_size,))
    # Vectors of the size of SmolLM2's embeddings; larger ones drown the text.
    tensors = {name: t * 0.02 if "bridge" in name else t for name, t in trained.tensors.items()}
    write_export(dataclasses.replace(trained, tensors=tensors), tmp_path / "export")
    model = ArcModel.from_checkpoint(tmp_path / "export", decoders=[source.path])
    rows = model.prompt_embeds(PROMPTS)
    stop_ids = model.decoder_stop_ids[0]
    ours = model.generate_ids([model.segments(p) for p in PROMPTS], max_new_tokens=NUM_TOKENS, stop_ids=stop_ids)
    assert continue_rows(theirs, rows, NUM_TOKENS, stop_ids) == ours
    tokenizer = model.decoder_tokenizers[0]
    assert tokenizer is not None and tokenizer.decode(ours[1]).startswith(" Paris")
    assert all(len(set(line)) > 3 for line in ours), "a repeated single token would prove little"
    wrong = [torch.cat((row[:3], row[4:])) for row in rows]
    assert continue_rows(theirs, wrong, 12, stop_ids) != [line[:12] for line in ours]

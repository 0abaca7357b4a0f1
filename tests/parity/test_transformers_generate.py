"""Greedy generation against `transformers`' own `generate(do_sample=False)`: the same tokens (issue 2, show 4).

`test_transformers.py` compares logits, and tokens after the same prefix. Here each side uses only its own cache.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arc_ds import Segment
from arc_ds.batch.packing import pack
from arc_ds.batch.segments import Sample
from arc_ds.inference.generate import generate_ids
from arc_ds.model.decoder import Decoder
from arc_ds.model.weights import open_backbone
from arc_ds.tokenizers import load_tokenizer
from tests.parity.test_transformers import CASES, SPEC, load_decoder, make_model, random_sequences

NUM_TOKENS = 64
TEXTS = ["The capital of France is", "Mr. Speaker, Mr. Vice President, members of Congress: in the past year"]


def our_tokens(decoder: Decoder, prompts: list[list[int]], stop_ids: tuple[int, ...] = ()) -> list[list[int]]:
    """Generate from all prompts as one batch."""
    batch = pack([Sample("parity", (Segment.text(ids),)) for ids in prompts], SPEC)
    return generate_ids(decoder, batch, None, max_new_tokens=NUM_TOKENS, stop_ids=stop_ids)


@torch.no_grad()
def their_tokens(model, prompts: list[list[int]], eos: int | None = None) -> list[list[int]]:
    """Generate from one prompt at a time, without the end token."""
    lines = []
    for ids in prompts:
        given = torch.tensor([ids])
        out = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            eos_token_id=eos,
            pad_token_id=0,
        )
        line = out[0, len(ids) :].tolist()
        lines.append(line[: line.index(eos)] if eos in line else line)
    return lines


@pytest.mark.parametrize("case", ["grouped_2", "tied", "llama3_scaling", "olmo"])
def test_tiny_models_generate_the_same_tokens(tmp_path: Path, case: str) -> None:
    family, sizes = CASES[case]
    model = make_model(family, tmp_path, **sizes)
    model.generation_config.eos_token_id = None
    decoder = load_decoder(open_backbone(tmp_path))
    prompts = random_sequences(96, (5, 17))
    ours = our_tokens(decoder, prompts)
    assert ours == their_tokens(model, prompts)
    assert all(len(set(line)) > 3 for line in ours), "a repeated single token would prove little"
    eos = ours[0][NUM_TOKENS // 2]
    assert our_tokens(decoder, prompts, (eos,)) == their_tokens(model, prompts, eos)


def test_a_scaling_left_out_changes_the_tokens(tmp_path: Path) -> None:
    model = make_model("Llama", tmp_path, **CASES["llama3_scaling"][1])
    model.generation_config.eos_token_id = None
    prompts = random_sequences(96, (40,))
    assert our_tokens(load_decoder(open_backbone(tmp_path, "none")), prompts) != their_tokens(model, prompts)


@pytest.mark.slow
def test_smollm2_continues_two_texts_with_the_same_tokens(smollm2) -> None:
    source, model = smollm2
    tokenizer = load_tokenizer(source.path)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    decoder = load_decoder(source)
    ours = our_tokens(decoder, prompts, (tokenizer.eos_id,))
    assert ours == their_tokens(model, prompts, tokenizer.eos_id)
    assert tokenizer.decode(ours[0]).startswith(" Paris")

"""Our decoder against `transformers`, both reading the same files (issue 2, show 4).

Logits agree within 1e-4 in fp32. Greedy generation gives the tokens of `generate(do_sample=False)`, each side with its
own cache. Tests also break one thing deliberately and check that the difference exceeds the bound.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arc_ds.batch.packing import PackedBatch, PoolingSpec, pack
from arc_ds.batch.segments import Sample, Segment
from arc_ds.inference.generate import generate_ids
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.decoder import Decoder
from arc_ds.model.weights import BackboneSource, load_backbone, open_backbone, permute_rotary
from arc_ds.tokenizers import load_tokenizer
from tests.helpers import tiny_models as tiny

transformers = pytest.importorskip("transformers")

ATOL = 1e-4  # worst measured on SmolLM2, whose logits reach 30: 4.8e-5
NUM_TOKENS = 64
TEXTS = ["The capital of France is", "Mr. Speaker, Mr. Vice President, members of Congress: in the past year"]
TINY_ATOL = 2e-5  # worst measured on the tiny models: 7.5e-6
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def load_decoder(source: BackboneSource, config: BackboneConfig | None = None) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(config or source.config)
    load_backbone(decoder, source)
    return decoder


def text_batch(sequences: list[list[int]]) -> PackedBatch:
    return pack([Sample("parity", (Segment.text(ids),)) for ids in sequences], PoolingSpec(()))


@torch.no_grad()
def our_logits(decoder: Decoder, sequences: list[list[int]]) -> list[Tensor]:
    """Logits at every token of each sequence, with all sequences packed into one batch."""
    batch = text_batch(sequences)
    logits = decoder.logits(batch, None, batch.text_rows)
    return list(logits.split([len(ids) for ids in sequences]))


@torch.no_grad()
def their_logits(model, sequences: list[list[int]]) -> list[Tensor]:
    """Logits of transformers, one sequence at a time without padding."""
    return [model(torch.tensor([ids])).logits[0].float() for ids in sequences]


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def random_sequences(vocab_size: int, lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def make_model(family: str, folder: Path, **sizes):
    """Save a tiny random model of transformers to `folder`. Its weights are large, so every part matters."""
    base = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "initializer_range": 0.2,
        "eos_token_id": 1,
        "bos_token_id": 0,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{family}Config")
    model = getattr(transformers, f"{family}ForCausalLM")(config_class(**{**base, **sizes}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model = model.eval().float()
    model.save_pretrained(folder)
    return model


CASES = {
    "multi_head": ("Llama", {}),
    "grouped_2": ("Llama", {"num_key_value_heads": 2}),
    "grouped_4": ("Llama", {"num_key_value_heads": 1}),
    "tied": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "head_dim": ("Llama", {"num_key_value_heads": 2, "head_dim": 24}),
    "rope_theta": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama3_scaling": ("Llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3}),
    "norm_eps": ("Llama", {"rms_norm_eps": 1e-2}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "olmo": ("Olmo", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_tiny_models_have_the_logits_of_transformers(tmp_path: Path, case: str):
    family, sizes = CASES[case]
    model = make_model(family, tmp_path, **sizes)
    source = open_backbone(tmp_path)
    sequences = random_sequences(96, (50, 1, 7, 128))
    theirs = their_logits(model, sequences)
    assert largest_difference(our_logits(load_decoder(source), sequences), theirs) < TINY_ATOL
    config = source.config
    wrong = {
        "rope_theta": dataclasses.replace(config, rope_theta=10000.0),
        "llama3_scaling": dataclasses.replace(config, rope_scaling=None),
        "norm_eps": dataclasses.replace(config, norm_eps=1e-5),
    }.get(case, dataclasses.replace(config, rope_theta=2 * config.rope_theta))
    assert largest_difference(our_logits(load_decoder(source, wrong), sequences), theirs) > 1.0


def test_wrong_pairing_of_rotary_rows_would_be_seen(tmp_path: Path):
    model = make_model("Llama", tmp_path, num_key_value_heads=2)
    decoder = load_decoder(open_backbone(tmp_path))
    sequences = random_sequences(96, (40,))
    attention = decoder.layers[1].attention
    attention.wq.weight.data = permute_rotary(attention.wq.weight.data, 4, to="interleaved")
    assert largest_difference(our_logits(decoder, sequences), their_logits(model, sequences)) > 1.0


@pytest.mark.parametrize("layout", ["meta", "mistral", "gguf"])
def test_other_layouts_of_the_same_weights_have_the_same_logits(tmp_path: Path, layout: str):
    model = make_model("Llama", tmp_path / "hf", num_key_value_heads=2, intermediate_size=192)
    source = open_backbone(tmp_path / "hf")
    tensors = {name: source.tensor(name) for name in source.shapes}
    if layout == "gguf":
        path = tiny.write_gguf(tmp_path / "model.gguf", source.config, tensors)
    elif layout == "meta":
        path = tiny.write_llama_pickles(tmp_path / "meta", source.config, tensors, 2)
    else:
        path = tiny.write_mistral(tmp_path / "mistral", source.config, tensors)
    sequences = random_sequences(96, (33, 8))
    ours = our_logits(load_decoder(open_backbone(path)), sequences)
    assert largest_difference(ours, their_logits(model, sequences)) < TINY_ATOL


@pytest.mark.slow
def test_smollm2_has_the_logits_of_transformers(smollm2):
    source, model = smollm2
    decoder = load_decoder(source)
    sequences = random_sequences(source.config.vocab_size, (96, 1, 30))
    theirs = their_logits(model, sequences)
    assert largest_difference(our_logits(decoder, sequences), theirs) < ATOL
    for name, heads in (("wq", source.config.num_heads), ("wk", source.config.num_kv_heads)):
        weight = getattr(decoder.layers[0].attention, name).weight
        weight.data = permute_rotary(weight.data, heads, to="interleaved")  # as stored in the file
    assert largest_difference(our_logits(decoder, sequences), theirs) > 1.0


def our_tokens(decoder: Decoder, prompts: list[list[int]], stop_ids: tuple[int, ...] = ()) -> list[list[int]]:
    """Generate from all prompts as one batch."""
    return generate_ids(decoder, text_batch(prompts), None, max_new_tokens=NUM_TOKENS, stop_ids=stop_ids)


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

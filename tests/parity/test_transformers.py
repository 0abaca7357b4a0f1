"""Our decoder and encoder against `transformers`, both reading the same files.

`CASES` has at least one entry for each family. For each, logits, gradients of compressed vectors, hidden states of a
causal encoder and greedy tokens (each side with its own cache) are those of transformers, which runs one sequence at a
time, while ours are packed. Each case names wrong variants, which must exceed the bound.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from arc_ds.batch.packing import PoolingSpec, pack
from arc_ds.batch.segments import Sample, Segment
from arc_ds.model.backbone import Recompute
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.decoder import Decoder
from arc_ds.model.encoder import Encoder, PoolingLayout
from arc_ds.model.pooling import get_strategy
from arc_ds.model.weights import BackboneSource, load_backbone, open_backbone, permute_rotary
from arc_ds.model.weights.names import beyond_layers
from arc_ds.tokenizers import load_tokenizer
from tests.helpers.generation import generate_ids

pytest.importorskip("transformers")
import transformers

from tests.helpers.transformers_generate import continue_prompts, continue_rows
from tests.helpers.transformers_models import text_batch

ATOL = 1e-4  # worst measured on SmolLM2, whose logits reach 30: 4.8e-5
NUM_TOKENS = 64
TEXTS = ["The capital of France is", "Mr. Speaker, Mr. Vice President, members of Congress: in the past year"]
RTOL = 1e-5  # of the largest value, in fp32; worst measured: logits 1.8e-6 (Phi-4-mini), gradients 2.4e-6 (Granite)
WRONG = 1e-3  # a wrong variant differs by at least this part of the largest value; least measured: 0.2
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 2.0,
    "beta_slow": 0.05,
}


def load_decoder(source: BackboneSource, config: BackboneConfig | None = None, **settings: bool) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(config or source.config, **settings)
    load_backbone(decoder, source)
    return decoder


def load_encoder(source: BackboneSource, *, causal: bool = True) -> Encoder:
    """All layers of a backbone but the last, without pooling."""
    layout = PoolingLayout(strategy=get_strategy("mean"), num_pooled_layers=0)
    num_layers = source.config.num_layers - 1
    with torch.device("meta"):
        encoder = Encoder(source.config, num_layers=num_layers, pooling=layout, causal=causal)
    load_backbone(encoder, source, allow_unused=beyond_layers(num_layers))
    return encoder


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
    return max(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True))


def relative_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference as a part of the largest value."""
    return largest_difference(ours, theirs) / max(float(tensor.detach().abs().max()) for tensor in theirs)


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
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
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
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model = model.eval().float()
    model.save_pretrained(folder)
    return model


class Case(NamedTuple):
    """A family with settings that use all of its parts.

    family: prefix of the classes of transformers.
    sizes: changes to the sizes in `make_model`.
    wrong: changes to our config, each of which must be seen.
    zeroed: ends of names of parameters; without all parameters with one of them, the model must be another one.
    """

    family: str
    sizes: dict[str, Any]
    wrong: tuple[dict[str, Any], ...] = ({"rope_theta": 20000.0},)
    zeroed: tuple[str, ...] = ()


def scaled(**changes: Any) -> dict[str, Any]:
    """A wrong variant with other values in the rotary scaling."""
    return {"rope_scaling": changes}


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
    "long_factor": [1.5, 2.0, 3.0, 5.0, 8.0, 12.0],
}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
CASES = {
    "multi_head": Case("Llama", {"num_key_value_heads": 4}),
    "grouped_4": Case("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "head_dim": Case("Llama", {"head_dim": 24, "rms_norm_eps": 1e-2}, ({"norm_eps": 1e-5},)),
    "llama2": Case("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama3": Case("Llama", {"rope_parameters": LLAMA3}, ({"rope_scaling": None}, scaled(factor=4.0))),
    "llama_biases": Case(
        "Llama",
        {"attention_bias": True, "mlp_bias": True},
        zeroed=(".wq.bias", ".wk.bias", ".wv.bias", ".wo.bias", ".w1.bias", ".w2.bias", ".w3.bias"),
    ),
    "linear": Case(
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        ({"rope_scaling": None},),
    ),
    "dynamic": Case(
        "Llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
            "max_position_embeddings": 90,
        },
        ({"rope_scaling": None}, scaled(factor=2.0)),
    ),
    "yarn": Case(
        "Qwen2",
        {"rope_parameters": YARN},
        (
            {"rope_scaling": None},
            scaled(attention_factor=1.0),
            scaled(beta_fast=32.0),
            scaled(beta_slow=1.0),
            scaled(truncate=False),
        ),
    ),
    "mistral": Case("Mistral", {"sliding_window": 9}, ({"windowed_layers": ()}, {"window": 10}, {"window": 8})),
    "mistral_nemo": Case("Mistral", {"sliding_window": None, "head_dim": 24}),
    "ministral": Case(
        "Ministral",
        {
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        ({"windowed_layers": (0, 1, 2)}, {"windowed_layers": (1,)}),
    ),
    "ministral3": Case(
        "Ministral3",
        # The original context ends within a prefix, whose queries but not keys then have the factor.
        {
            "rope_parameters": {
                **YARN,
                "original_max_position_embeddings": 16,
                **{"beta_fast": 32.0, "beta_slow": 1e-9},  # their pairs are beyond the first and the last one
                **{"mscale": 1.0, "mscale_all_dim": 0.5, "llama_4_scaling_beta": 0.3},
            }
        },
        (scaled(query_beta=0.0), scaled(attention_factor=1.0)),
    ),
    "olmo": Case("Olmo", {"clip_qkv": 0.7}, ({"clip_qkv": None},)),
    "olmo2": Case("Olmo2", {}, ({"norm_place": "input"},), ("q_norm.weight", "k_norm.weight")),
    "olmo3": Case(
        "Olmo3",
        {
            "num_hidden_layers": 4,
            "sliding_window": 9,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        ({"windowed_rope_scaling": True}, {"windowed_layers": ()}, {"rope_scaling": None}, {"norm_place": "input"}),
    ),
    "qwen2": Case("Qwen2", {}, zeroed=(".wq.bias", ".wk.bias", ".wv.bias")),
    "qwen2_window": Case("Qwen2", QWEN_WINDOW, ({"windowed_layers": ()}, {"windowed_layers": (0, 1, 2)})),
    "qwen3": Case("Qwen3", {"tie_word_embeddings": True}, zeroed=("q_norm.weight", "k_norm.weight")),
    "smollm3": Case(
        "SmolLM3",
        {"num_hidden_layers": 4, "no_rope_layer_interval": 3},
        ({"layers_without_rope": ()}, {"layers_without_rope": (1,)}),
    ),
    "granite": Case(
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.4,
            "logits_scaling": 5.0,
        },
        (
            {"embedding_multiplier": 1.0},
            {"residual_multiplier": 1.0},
            {"attention_scale": None},
            {"logits_multiplier": 1.0},
        ),
    ),
    "phi3": Case("Phi3", {"sliding_window": 9}, ({"windowed_layers": ()},)),
    "phi4_mini": Case(
        "Phi3",
        {
            "tie_word_embeddings": True,
            "max_position_embeddings": 400,
            "original_max_position_embeddings": 90,
            "rope_parameters": {**LONGROPE, "partial_rotary_factor": 0.75},
        },
        (scaled(short_factors=(1.0,) * 6), scaled(long_factors=(1.0,) * 6), scaled(attention_factor=1.0)),
    ),
}


def changed(config: BackboneConfig, changes: dict[str, Any]) -> BackboneConfig:
    """A config with other values. A dict changes the fields of `rope_scaling`."""
    scaling = changes.get("rope_scaling")
    if isinstance(scaling, dict):
        changes = {"rope_scaling": dataclasses.replace(config.rope_scaling, **scaling)}
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """(the case, our source, the model of transformers)."""
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    model = make_model(case.family, folder, **case.sizes)
    return case, open_backbone(folder), model


LENGTHS = (50, 1, 7, 128)


def test_logits_are_those_of_transformers(case) -> None:
    case, source, model = case
    sequences = random_sequences(96, LENGTHS)
    theirs = their_logits(model, sequences)
    decoder = load_decoder(source)
    assert relative_difference(our_logits(decoder, sequences), theirs) < RTOL
    for changes in case.wrong:
        wrong = load_decoder(source, changed(source.config, changes))
        assert relative_difference(our_logits(wrong, sequences), theirs) > WRONG, changes
    for ending in case.zeroed:
        wrong = load_decoder(source)
        for name, parameter in wrong.named_parameters():
            if name.endswith(ending):
                parameter.data.zero_()
        assert relative_difference(our_logits(wrong, sequences), theirs) > WRONG, ending


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_losses_and_gradients_of_compressed_vectors_are_those_of_transformers(case, checkpointing: Recompute) -> None:
    """The prefixes run without gradient, the suffixes with it; transformers runs whole sequences."""
    _, source, model = case
    text, context, answer = (
        random_sequences(96, (21, 5, 30)),
        random_sequences(96, (4, 6)),
        random_sequences(96, (24, 3)),
    )
    samples = [
        Sample("a", (Segment.text(text[0]), Segment.context(context[0], None), Segment.text(answer[0], True))),
        Sample("b", (Segment.text(text[1]), Segment.context(context[1], None), Segment.text(answer[1], True))),
        Sample("c", (Segment.text(text[2], True),)),
    ]
    batch = pack(samples, PoolingSpec(()))
    decoder = load_decoder(source, activation_checkpointing=checkpointing)
    z_ZD = torch.randn(10, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ours = decoder(batch, z_ZD)
    (our_gradient,) = torch.autograd.grad(ours.sum(), z_ZD)
    rows_RD = decoder.embed(batch, z_ZD)
    parts = rows_RD.split(batch.decoder_cu_seqlens.diff().tolist())
    logits_RV = torch.cat([model(inputs_embeds=part[None]).logits[0] for part in parts])
    theirs = torch.nn.functional.cross_entropy(logits_RV[batch.label_rows], batch.labels, reduction="none")
    (their_gradient,) = torch.autograd.grad(theirs.sum(), z_ZD)
    assert batch.prefix is not None and batch.prefix.prefix_rows.numel() == 26
    assert relative_difference([ours], [theirs]) < RTOL
    assert their_gradient.abs().amax(dim=1).min() > 0
    assert relative_difference([our_gradient], [their_gradient]) < RTOL


def test_hidden_states_of_a_causal_encoder_are_those_of_transformers(case) -> None:
    case, source, model = case
    contexts = random_sequences(96, LENGTHS)
    batch = pack([Sample("e", (Segment.context(ids, None), Segment.text([0]))) for ids in contexts], PoolingSpec(()))
    with torch.no_grad():
        theirs = [model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-2][0] for ids in contexts]
        ours = load_encoder(source)(batch)
        assert relative_difference([ours], [torch.cat(theirs)]) < RTOL
        both_ways = load_encoder(source, causal=False)(batch)
    assert relative_difference([both_ways], [torch.cat(theirs)]) > WRONG


def test_greedy_tokens_are_those_of_transformers(case) -> None:
    _, source, model = case
    prompts = random_sequences(96, (5, 17))
    ours = our_tokens(load_decoder(source), prompts)
    assert ours == continue_prompts(model, prompts, NUM_TOKENS)
    assert all(len(set(line)) > 3 for line in ours), "a repeated single token would prove little"


@pytest.mark.parametrize("name", ["granite", "olmo3"])
def test_rows_with_compressed_vectors_are_inputs_embeds_of_transformers(tmp_path: Path, name: str) -> None:
    """Granite multiplies `inputs_embeds`, so compressed vectors must be in the space before its multiplier."""
    model = make_model(CASES[name].family, tmp_path, **CASES[name].sizes)
    model.generation_config.eos_token_id = None
    source = open_backbone(tmp_path)
    decoder = load_decoder(source)
    before, context, after = random_sequences(96, (9, 6, 5))
    prompt = Sample("p", (Segment.text(before), Segment.context(context, None), Segment.text(after)))
    batch = pack([prompt], PoolingSpec(()))
    z_ZD = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    (ours,) = generate_ids(decoder, batch, z_ZD, max_new_tokens=NUM_TOKENS)
    rows = decoder.embed(batch, z_ZD)
    assert [ours] == continue_rows(model, [rows], NUM_TOKENS)
    if name == "granite":
        assert [ours] != continue_rows(model, [3.0 * rows], NUM_TOKENS)


@pytest.mark.parametrize("tied", [False, True])
def test_the_language_model_of_a_model_of_images_is_read(tmp_path: Path, tied: bool) -> None:
    text = {
        "sliding_window": None,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_attention_heads": 4,
        "vocab_size": 96,
    }
    sizes = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2}
    images = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral", "initializer_range": 0.2, **sizes, **text},
        vision_config={"model_type": "pixtral", "image_size": 32, "patch_size": 16, **images},
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = transformers.Mistral3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    source = open_backbone(tmp_path)
    assert any("vision_tower" in name for name in source.store.shapes), "the folder must hold another module"
    sequences = random_sequences(96, (33, 8))
    ours = our_logits(load_decoder(source), sequences)
    assert relative_difference(ours, their_logits(model, sequences)) < RTOL
    assert source.config.tie_embeddings == tied


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


@pytest.mark.slow
def test_smollm2_continues_two_texts_with_the_same_tokens(smollm2) -> None:
    source, model = smollm2
    tokenizer = load_tokenizer(source.path)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    decoder = load_decoder(source)
    ours = our_tokens(decoder, prompts, (tokenizer.eos_id,))
    assert ours == continue_prompts(model, prompts, NUM_TOKENS, [tokenizer.eos_id])
    assert tokenizer.decode(ours[0]).startswith(" Paris")

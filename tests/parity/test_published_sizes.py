"""Real sizes on the meta device: our decoder and that of transformers, from the configs of published models.

`arc_ds/planning/published_configs.json` gives for each model its source, its published number of parameters (exact, or
in billions as rounded on its page) and the keys of its config.json that decide names, shapes and computation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from arc_ds.model.decoder import Decoder
from arc_ds.model.weights import read_backbone_config
from arc_ds.model.weights.fields import Fields
from arc_ds.model.weights.hf_config import names_of_hugging_face
from arc_ds.planning.published import published_models

transformers = pytest.importorskip("transformers")

MODELS: dict[str, dict[str, Any]] = published_models()


def ours_on_meta(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our parameters: name → the tensor of the file that holds it, and its shape."""
    names = names_of_hugging_face(Fields.read(folder / "config.json"))
    with torch.device("meta"):
        decoder = Decoder(read_backbone_config(folder))
    return {name: (names.find(name)[0], tuple(parameter.shape)) for name, parameter in decoder.named_parameters()}


def theirs_on_meta(folder: Path) -> dict[str, tuple[int, ...]]:
    """The parameters of transformers: name in a file → shape. A tied head is one parameter."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    model.tie_weights()
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def stacked(ours: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """The shapes of the file's tensors that hold our parameters, each with the rows of all of them."""
    found: dict[str, tuple[int, ...]] = {}
    for name_in_file, shape in ours.values():
        num_rows = found[name_in_file][0] if name_in_file in found else 0
        found[name_in_file] = (num_rows + shape[0], *shape[1:])
    return found


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def as_published(num_parameters: int, published: int | str) -> int | str:
    """The number, rounded as the published one."""
    if isinstance(published, int):
        return num_parameters
    digits = len(published.removesuffix("B").partition(".")[2])
    return f"{num_parameters / 1e9:.{digits}f}B"


def write(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_names_shapes_and_counts_are_those_of_transformers_and_of_the_publication(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path, MODELS[name]["config"])
    ours, theirs = stacked(ours_on_meta(folder)), theirs_on_meta(folder)
    assert ours == theirs
    published = MODELS[name]["parameters"]
    assert as_published(count(ours), published) == published


@pytest.mark.parametrize("name", MODELS)
def test_another_config_would_be_seen(name: str, tmp_path: Path) -> None:
    config = MODELS[name]["config"]
    folder = write(tmp_path, config | {"num_key_value_heads": 1})
    ours = stacked(ours_on_meta(folder))
    published = MODELS[name]["parameters"]
    assert as_published(count(ours), published) != published
    assert ours != theirs_on_meta(write(tmp_path, config))

"""Errors in a weights folder are reported before loading, with the expected value, the found value and the remedy."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from arc_ds.errors import WeightsError
from arc_ds.model.weights import open_backbone
from tests.helpers import tiny_models as tiny


@pytest.fixture
def config():
    return tiny.tiny_config()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers.1.feed_forward.w2.weight", None, r"1.mlp.down_proj.weight` is missing, expected \[32, 96\]"),
        ("output.weight", torch.zeros(39, 32), r"lm_head.weight` is \[39, 32\], expected \[40, 32\]"),
        ("output.weight", None, "lm_head.weight` is missing"),  # not taken for a tied head
    ],
)
def test_wrong_tensor_is_named_with_its_shapes(tmp_path: Path, config, name: str, value, message: str):
    tensors = {**tiny.random_tensors(config), name: value}
    if value is None:
        del tensors[name]
    with pytest.raises(WeightsError, match=message):
        open_backbone(tiny.write_hf(tmp_path / "hf", config, tensors))
    with pytest.raises(WeightsError, match=rf"`{name}` is"):
        open_backbone(tiny.write_mistral(tmp_path / "native", config, tensors))


def test_stacked_tensor_of_wrong_size_is_found(tmp_path: Path):
    config = tiny.tiny_config(family="olmo", norm="layer", num_kv_heads=4)
    folder = tiny.write_olmo(tmp_path, config, tiny.random_tensors(config))
    named = tiny.olmo_tensors(config, tiny.random_tensors(config))
    name = "model.transformer.blocks.1.ff_proj.weight"
    save_file({**named, name: named[name][:-1].clone()}, folder / "consolidated.safetensors")
    with pytest.raises(WeightsError, match=rf"{name}` is \[191, 32\], expected \[192, 32\]"):
        open_backbone(folder)


def test_missing_file_of_an_index_is_named(tmp_path: Path, config):
    folder = tiny.write_hf(tmp_path, config, tiny.random_tensors(config), 3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match="model-00002-of-00003.safetensors is missing"):
        open_backbone(folder)


def test_missing_meta_shard_is_found(tmp_path: Path, config):
    folder = tiny.write_llama_pickles(tmp_path, config, tiny.random_tensors(config), 4, n_kv_heads=2)
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(WeightsError, match="without gaps"):
        open_backbone(folder)
    (folder / "consolidated.02.pth").rename(folder / "consolidated.01.pth")
    (folder / "consolidated.03.pth").rename(folder / "consolidated.02.pth")
    with pytest.raises(WeightsError, match=r"is \[24, 32\], expected \[32, 32\]"):
        open_backbone(folder)


WRITERS = {
    "model.safetensors": lambda file, config, tensors: tiny.write_hf(file.parent, config, tensors),
    "consolidated.00.pth": lambda file, config, tensors: tiny.write_llama_pickles(file.parent, config, tensors, 1),
    "a.gguf": tiny.write_gguf,
}


@pytest.mark.parametrize(
    ("name", "keep", "message"),
    [
        *(("model.safetensors", keep, "cut short or damaged; copy it again") for keep in (0, 5, 200, -1)),
        *(("a.gguf", keep, "not a complete GGUF|cut short") for keep in (4, 30, 500, 2000, -40)),
        ("consolidated.00.pth", -500, "cannot be mapped"),
    ],
)
def test_truncated_file_is_found(tmp_path: Path, config, name: str, keep: int, message: str):
    file = tmp_path / name
    WRITERS[name](file, config, tiny.random_tensors(config))
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=message):
        open_backbone(tmp_path)


class _Code:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def test_pickle_with_code_is_not_run(tmp_path: Path, config):
    folder = tiny.write_llama_pickles(tmp_path / "m", config, tiny.random_tensors(config), 1)
    trace = tmp_path / "ran"
    torch.save({"tok_embeddings.weight": _Code(trace)}, folder / "consolidated.00.pth")
    with pytest.raises(WeightsError, match=r"can run code \(.*mkdir.*\)\. Get the weights as safetensors") as caught:
        open_backbone(folder)
    assert "\x1b" not in str(caught.value)
    assert not trace.exists()
    pickle.loads(pickle.dumps(_Code(trace)))
    assert trace.exists()  # the pickle runs code if it is trusted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "'qwen2'; ARC-DS reads llama, mistral, olmo, hf_olmo"),
        ({"attention_bias": True}, "attention_bias` is True"),
        ({"hidden_act": "gelu"}, "hidden_act` is 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaling is 'linear'; ARC-DS computes llama3"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor` to be a number above 0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor` is 0.5"),
        ({"hidden_size": "32"}, "hidden_size` to be a whole number of at least 1; it is '32'"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "cannot share 3 key heads"),
        ({"head_dim": 7}, "need an even one"),
        ({"tie_word_embeddings": "yes"}, "true or false"),
    ],
)
def test_config_that_we_do_not_compute_is_refused(tmp_path: Path, config, changes: dict, message: str):
    folder = tiny.write_hf(tmp_path, config, tiny.random_tensors(config), **changes)
    with pytest.raises(WeightsError, match=message) as caught:
        open_backbone(folder)
    assert "config.json" in str(caught.value)
    if "rope_scaling" in changes:
        assert open_backbone(folder, "none").config == config


def test_window_shorter_than_the_run_is_refused(tmp_path: Path):
    config = tiny.tiny_config(family="mistral")
    folder = tiny.write_hf(tmp_path, config, tiny.random_tensors(config), sliding_window=64)
    assert open_backbone(folder, max_positions=64).sliding_window == 64
    with pytest.raises(WeightsError, match="looks back 64 tokens, but the run has sequences of 65"):
        open_backbone(folder, max_positions=65)


@pytest.mark.parametrize("key", ["moe", "quantization", "vision_encoder"])
def test_native_parts_that_we_do_not_compute_are_refused(tmp_path: Path, config, key: str):
    folder = tiny.write_mistral(tmp_path, config, tiny.random_tensors(config), **{key: {"a": 1}})
    with pytest.raises(WeightsError, match=f"`{key}`"):
        open_backbone(folder)


def test_gguf_files_that_we_do_not_compute_are_refused(tmp_path: Path, config):
    tensors = tiny.random_tensors(config)
    file = tiny.write_gguf(tmp_path / "b.gguf", config, tensors, architecture="qwen2")
    with pytest.raises(WeightsError, match=r"'qwen2'; ARC-DS reads GGUF files of llama"):
        open_backbone(file)
    file = tiny.write_gguf(tmp_path / "a.gguf", config, tensors, rope_divisors=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    with pytest.raises(WeightsError, match="not the llama3 scaling"):
        open_backbone(file)
    assert open_backbone(file, "none").config.rope_scaling is None
    with pytest.raises(WeightsError, match="holds 2 .gguf files"):
        open_backbone(tmp_path)


def test_paths_without_weights_say_what_was_expected(tmp_path: Path, config):
    with pytest.raises(WeightsError, match=r"does not exist; expected a Hugging Face folder"):
        open_backbone(tmp_path / "nowhere")
    with pytest.raises(WeightsError, match="holds nothing; expected"):
        open_backbone(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(WeightsError, match=r"holds notes.txt; expected"):
        open_backbone(tmp_path)
    with pytest.raises(WeightsError, match="is a file but not GGUF"):
        open_backbone(tmp_path / "notes.txt")
    (tmp_path / "config.json").write_text(json.dumps(tiny.hf_config(config)))
    with pytest.raises(WeightsError, match="sizes but no weights"):
        open_backbone(tmp_path)
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match="cut short or damaged|as JSON"):
        open_backbone(tmp_path)

"""Errors in a weights folder are reported before loading, with the expected value, the found value and the remedy."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from arc_ds.errors import WeightsError
from arc_ds.model.weights import beyond_layers, open_backbone
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
    with pytest.raises(WeightsError, match="model-00002-of-00003.safetensors is missing.* delete it"):
        open_backbone(folder)
    tiny.write_hf(tmp_path, config, tiny.random_tensors(config))
    for path in (folder / "model.safetensors.index.json", *folder.glob("model-*")):
        path.unlink()  # the remedy
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


def _other_part(name: str, value: torch.Tensor | None) -> Callable[[dict], None]:
    def change(part: dict) -> None:
        del part[name]
        if value is not None:
            part[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_part("norm.weight", torch.ones(31)), r"`norm.weight` have the shapes \[32\], \[31\]"),
        (_other_part("layers.0.attention.wq.weight", torch.ones(16, 31)), r"wq.weight` have the shapes \[16, 32\], \["),
        (_other_part("layers.0.attention.wo.weight", torch.ones(31, 16)), r"wo.weight` have the shapes \[32, 16\], \["),
        (
            _other_part("tok_embeddings.weight", torch.ones(39, 16)),
            r"tok_embeddings.weight` have the shapes \[40, 16\]",
        ),
        (_other_part("layers.1.feed_forward.w2.weight", None), "consolidated.01.pth lacks `layers.1.feed_forward.w2"),
        (_other_part("norm.weight", torch.ones(32)), "differ in `norm.weight`, so they belong to different models"),
    ],
)
def test_meta_parts_of_different_models_are_refused(tmp_path: Path, config, change: Callable, message: str):
    folder = tiny.write_llama_pickles(tmp_path, config, tiny.random_tensors(config), 2, vocab_size=-1)
    file = folder / "consolidated.01.pth"
    part = torch.load(file)
    change(part)
    torch.save(part, file)
    with pytest.raises(WeightsError, match=message + r".*Copy all consolidated files of one model again"):
        open_backbone(folder)


def test_vectors_of_meta_parts_that_differ_late_are_refused_before_use(tmp_path: Path, config):
    folder = tiny.write_llama_pickles(tmp_path, config, tiny.random_tensors(config), 2)
    part = torch.load(folder / "consolidated.01.pth")
    part["layers.0.ffn_norm.weight"][-1] += 1
    torch.save(part, folder / "consolidated.01.pth")
    source = open_backbone(folder)
    with pytest.raises(WeightsError, match="differ in `layers.0.ffn_norm.weight`"):
        source.tensor("layers.0.ffn_norm.weight")


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
        ({"model_type": "gemma2"}, "'gemma2'; ARC-DS itself computes llama, .* set `implementation: transformers`"),
        ({"text_config": {"model_type": "gemma3_text"}, "model_type": "gemma3"}, "'gemma3'; ARC-DS itself computes"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias` is True"),
        ({"model_type": "qwen2", "mlp_bias": True}, "mlp_bias` is True"),
        ({"model_type": ["llama"]}, r"`model_type` is \['llama'\]"),
        ({"clip_qkv": 8.0}, "clip_qkv` is 8.0"),
        ({"model_type": "ministral", "layer_types": ["linear_attention"] * 2}, "`layer_types` to be a list of 'full"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "`no_rope_layers` to be a list of 0 or 1 for each layer"),
        ({"hidden_act": "gelu"}, "hidden_act` is 'gelu'"),
        *(
            ({key: {"bits": 4}}, f"`{key}` says that the weights are quantised; ARC-DS")
            for key in ("quantization_config", "quantization", "compression_config")
        ),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "scaling is 'ntk'; ARC-DS computes llama3, linear, dynamic"),
        ({"rope_scaling": {"type": "linear"}}, "`factor` to be a number above 0; it is missing"),
        (
            {
                "rope_scaling": {
                    "type": "longrope",
                    "factor": 2.0,
                    "original_max_position_embeddings": 64,
                    "short_factor": [1.0],
                    "long_factor": [2.0],
                }
            },
            r"`short_factor` to be a list of 4 numbers",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor` to be a number above 0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor` is 0.5"),
        (
            {"model_type": "phi3", "partial_rotary_factor": []},
            r"`partial_rotary_factor` to be a number above 0; it is \[\]",
        ),
        ({"rope_theta": "1e4"}, "`rope_theta` to be a number above 0; it is '1e4'"),
        ({"rms_norm_eps": float("inf")}, "`rms_norm_eps` to be a number above 0; it is inf"),
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


Q_PROJ = "model.layers.0.self_attn.q_proj"
LEFTOVERS = [
    (f"{Q_PROJ}.weight_scale", (1,), "quantised .* in bfloat16"),
    (f"{Q_PROJ}.bias", (32,), "a bias, which the config does not announce.* attention_bias"),
    (f"{Q_PROJ}.lora_A.default.weight", (4, 32), "not merged.*merge_and_unload"),
    ("model.layers.0._orig_mod.mlp.up_proj.weight", (96, 32), "a wrapper"),
    ("model.layers.0.block_sparse_moe.gate.weight", (8, 32), "mixture of experts"),
    ("model.layers.2.mlp.up_proj.weight", (96, 32), "beyond the 2 of the config. Set the number of layers"),
    ("model.layers.0.self_attn.rotary_emb.inv_freq", (4,), "other frequencies .* Correct rope_theta"),
    ("ema.model.norm.weight", (32,), "another prefix"),
    ("layers.0.attention.wq.weight", (32, 32), "Meta/Mistral native name.* params.json"),
    ("score.weight", (2, 32), "another task.* As encoder.backbone"),
    ("vision_tower.patch.weight", (2, 2), "images"),
    ("model.layers.0.self_attn.q_norm.weight", (8,), "a norm of queries or keys, which the model_type"),
    ("model.layers.0.pre_feedforward_layernorm.weight", (32,), "another architecture.* `implementation: transformers`"),
]


@pytest.mark.parametrize(("name", "shape", "message"), LEFTOVERS)
def test_tensor_that_no_parameter_takes_is_named_with_its_meaning(
    tmp_path: Path, config, name: str, shape: tuple[int, ...], message: str
):
    folder = tiny.write_hf(tmp_path, config, tiny.random_tensors(config))
    save_file({name: torch.ones(shape)}, folder / "more.safetensors")
    with pytest.raises(WeightsError, match=f"`{re.escape(name)}`: probably .*{message}"):
        open_backbone(folder)
    (folder / "more.safetensors").unlink()  # the remedy
    open_backbone(folder)


def test_odd_headers_and_names_of_gguf_files_are_errors_in_words(tmp_path: Path, config):
    """A tensor without dimensions, an architecture that is a number, and a name with part 0 of 0."""
    tensors = tiny.random_tensors(config)
    scalar = tiny.write_gguf(tmp_path / "scalar.gguf", config, tensors, more={"x": torch.tensor(1.0)})
    with pytest.raises(WeightsError, match="`x`: probably part of another architecture"):
        open_backbone(scalar)
    file = tiny.write_gguf(tmp_path / "name-00000-of-00000.gguf", config, tensors)
    assert open_backbone(file).shapes.keys() == tensors.keys()
    key = b"general.architecture"
    listed = file.read_bytes().replace(
        key + struct.pack("<IQ", 8, 5) + b"llama", key + struct.pack("<IIQ", 9, 0, 1) + b"0"
    )
    file.write_bytes(listed)
    with pytest.raises(WeightsError, match=r"`general.architecture` is '\[48\]'"):
        open_backbone(file)


def test_many_missing_files_are_counted(tmp_path: Path):
    config = tiny.tiny_config(num_layers=3)
    tiny.write_hf(tmp_path, config, tiny.random_tensors(config), 23)
    for file in tmp_path.glob("model-*"):
        file.unlink()
    with pytest.raises(WeightsError, match=r"names 23 files, but model-00001-of-00023.*; and 3 more are missing"):
        open_backbone(tmp_path)


def test_all_tensors_at_fault_are_listed_with_their_layers(tmp_path: Path):
    """A model of many layers has a hundred tensors of one fault."""
    config = tiny.tiny_config(num_layers=12)
    tensors = tiny.random_tensors(config)
    for layer_idx in (*range(3), 5, *range(10, 12)):
        del tensors[f"layers.{layer_idx}.attention.wq.weight"]
        tensors[f"layers.{layer_idx}.feed_forward.w1.weight"] = torch.ones(4, 32)
    tiny.write_hf(tmp_path, config, tensors)
    biases = {f"model.layers.{layer_idx}.self_attn.o_proj.bias": torch.ones(32) for layer_idx in range(12)}
    save_file(biases, tmp_path / "more.safetensors")
    with pytest.raises(WeightsError) as error:
        open_backbone(tmp_path)
    for words in (
        "`model.layers.{0-2,5,10-11}.self_attn.q_proj.weight` is missing",
        "`model.layers.{0-2,5,10-11}.mlp.gate_proj.weight` is [4, 32]",
        "`model.layers.{0-11}.self_attn.o_proj.bias`: probably a bias",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize("name", ["output_norm.bias", "rope_factors.weight", "blk.2.attn_norm.weight"])
def test_gguf_tensor_that_no_parameter_takes_is_named(tmp_path: Path, config, name: str):
    tensors = tiny.random_tensors(config)
    with pytest.raises(WeightsError, match=f"`{name}`: probably"):
        open_backbone(tiny.write_gguf(tmp_path / "a.gguf", config, tensors, more={name: torch.ones(32)}))
    with pytest.raises(WeightsError, match="`x` has the block format 28"):
        more = {"x": torch.ones(4, dtype=torch.float64)}
        open_backbone(tiny.write_gguf(tmp_path / "b.gguf", config, tensors, more=more))


def test_stored_head_beside_a_tied_one_is_used_or_refused(tmp_path: Path):
    config = tiny.tiny_config(tie_embeddings=True)
    tensors = tiny.random_tensors(config)
    head = tensors["tok_embeddings.weight"].clone()
    open_backbone(tiny.write_hf(tmp_path, config, {**tensors, "output.weight": head}))
    head[-1] += 1
    folder = tiny.write_hf(tmp_path, config, {**tensors, "output.weight": head})
    with pytest.raises(WeightsError, match=r"`lm_head.weight`: probably a head of its own.*Set tie_word_embeddings"):
        open_backbone(folder)
    open_backbone(folder, is_unused=beyond_layers(2))
    tiny.write_hf(tmp_path, config, {**tensors, "output.weight": head}, tie_word_embeddings=False)  # the remedy
    assert torch.equal(open_backbone(folder).tensor("output.weight"), head)
    del tensors["tok_embeddings.weight"]
    tiny.write_hf(tmp_path, config, {**tensors, "output.weight": head})
    with pytest.raises(WeightsError, match=r"`lm_head.weight`: probably the embedding.* to model.embed_tokens.weight"):
        open_backbone(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32])
def test_dtype_that_needs_a_scale_is_refused(tmp_path: Path, config, dtype: torch.dtype):
    tensors = tiny.random_tensors(config)
    tensors["layers.0.attention.wq.weight"] = tensors["layers.0.attention.wq.weight"].to(dtype)
    with pytest.raises(WeightsError, match=r"model.safetensors: expected floats .*q_proj.weight` is [FIU].*\.gguf"):
        open_backbone(tiny.write_hf(tmp_path / "hf", config, tensors))
    if dtype != torch.float8_e4m3fn:  # torch.chunk of the writer
        with pytest.raises(WeightsError, match=r"consolidated.00.pth: expected floats .*wq.weight` is u?int"):
            open_backbone(tiny.write_llama_pickles(tmp_path / "meta", config, tensors, 1))


def test_scaled_fp8_is_refused_with_a_remedy_in_every_part(tmp_path: Path, config):
    """The files of DeepSeek and Qwen: float8 weights, blocks of scales, and quantization_config."""
    parts = [f"model.layers.{n}.mlp.gate" for n in range(500)]
    quantised = {"quantization_config": {"quant_method": "fp8", "modules_to_not_convert": parts}}
    tensors = tiny.random_tensors(config)
    folder = tiny.write_hf(tmp_path, config, tensors, **quantised)
    with pytest.raises(WeightsError, match=r"`quantization_config` says .* quantised \(fp8\).*a .gguf") as caught:
        open_backbone(folder)
    assert len(str(caught.value)) < 300 + len(str(folder)), "lists of modules do not help"
    tiny.write_hf(folder, config, tensors)
    scale = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    save_file({scale: torch.ones(1, 1)}, folder / "scales.safetensors")
    with pytest.raises(WeightsError, match=rf"`{scale}`: probably part of quantised weights.*in bfloat16, or a \.gguf"):
        open_backbone(folder)


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "adapter_config.json"])
def test_settings_beside_the_config_that_change_the_weights_are_refused(tmp_path: Path, config, name: str):
    for folder in (
        tiny.write_hf(tmp_path / "hf", config, tiny.random_tensors(config)),
        tiny.write_mistral(tmp_path / "native", config, tiny.random_tensors(config)),
    ):
        (folder / name).write_text("{}")
        with pytest.raises(WeightsError, match=f"{name}: these settings.* delete this file"):
            open_backbone(folder)
        (folder / name).unlink()
        open_backbone(folder)


def test_pickle_of_more_than_tensors_is_named(tmp_path: Path, config):
    folder = tiny.write_llama_pickles(tmp_path, config, tiny.random_tensors(config), 1)
    torch.save({"model": {"norm.weight": torch.ones(32)}, "epoch": 1}, folder / "consolidated.00.pth")
    with pytest.raises(WeightsError, match="`model` is a dict; `epoch` is a int.*state_dict"):
        open_backbone(folder)


def _stray_file(folder: Path, config, tensors) -> Path:
    named = {tiny.hf_name(name): tensor for name, tensor in tensors.items()}
    tiny.write_hf(folder, config, tiny.random_tensors(config))
    save_file(named, folder / "adapted.safetensors")
    return folder


def _alone_beside_an_index(folder: Path, config, tensors) -> Path:
    tiny.write_hf(folder, config, tensors)
    return tiny.write_hf(folder, config, tiny.random_tensors(config), 2)


def _shards_without_index(folder: Path, config, tensors) -> Path:
    tiny.write_hf(folder, config, tensors, 3)
    tiny.write_hf(folder, config, tiny.random_tensors(config), 2)
    (folder / "model.safetensors.index.json").unlink()
    return folder


def _pickle_beside_safetensors(folder: Path, config, tensors) -> Path:
    tiny.write_llama_pickles(folder, config, tensors, 2)
    return tiny.write_mistral(folder, config, tiny.random_tensors(config))


@pytest.mark.parametrize(
    "write", [_stray_file, _alone_beside_an_index, _shards_without_index, _pickle_beside_safetensors]
)
def test_two_sets_of_weights_must_be_equal(tmp_path: Path, config, write: Callable):
    tensors = tiny.random_tensors(config)
    source = open_backbone(write(tmp_path / "equal", config, tensors))
    assert all(torch.equal(source.tensor(name), tensor) for name, tensor in tensors.items())
    with pytest.raises(
        WeightsError, match=r"\S+(safetensors|pth) and \S+(safetensors|pth) differ in .* Move that file"
    ):
        open_backbone(write(tmp_path / "other", config, tiny.random_tensors(config, seed=1)))
    tensors["output.weight"][-1] += 1
    source = open_backbone(write(tmp_path / "late", config, tensors))  # reads the first rows only
    with pytest.raises(WeightsError, match="differ in"):
        source.tensor("output.weight")


def test_index_decides_between_two_sets_of_shards(tmp_path: Path, config):
    tiny.write_hf(tmp_path, config, tiny.random_tensors(config, seed=1), 3)
    tensors = tiny.random_tensors(config)
    source = open_backbone(tiny.write_hf(tmp_path, config, tensors, 2))
    assert all(torch.equal(source.tensor(name), tensor) for name, tensor in tensors.items())


def test_tensors_without_values_are_named_as_partitioned(tmp_path: Path):
    """A tied head without values, which DeepSpeed writes too, is harmless."""
    config = tiny.tiny_config(tie_embeddings=True)
    tensors = {**tiny.random_tensors(config), "output.weight": torch.zeros(0)}
    folder = tiny.write_hf(tmp_path, config, tensors)
    open_backbone(folder)
    tiny.write_hf(tmp_path, config, {**tensors, "layers.0.attention.wq.weight": torch.zeros(0)})
    with pytest.raises(WeightsError, match=r"q_proj.weight` and 0 others hold no values.* zero_to_fp32"):
        open_backbone(folder)


def test_decoder_without_a_head_is_named_as_an_encoder(tmp_path: Path, config):
    tensors = tiny.random_tensors(config)
    del tensors["output.weight"]
    for folder in (tiny.write_hf(tmp_path / "a", config, tensors), tiny.write_mistral(tmp_path / "b", config, tensors)):
        with pytest.raises(WeightsError, match="weight` is missing.*weights of an encoder.* use the causal language"):
            open_backbone(folder)


@pytest.mark.parametrize("windows", [[64, 32, 16, None], [None, 64, 32], [], ["a"], [0]], ids=str)
def test_windows_that_are_no_windows_of_the_layers_are_refused(tmp_path: Path, config, windows: list):
    folder = tiny.write_mistral(tmp_path, config, tiny.random_tensors(config), sliding_window=windows)
    with pytest.raises(WeightsError, match="params.json: expected `sliding_window` to be"):
        open_backbone(folder)


@pytest.mark.parametrize("key", ["moe", "quantization", "vision_encoder"])
def test_native_parts_that_we_do_not_compute_are_refused(tmp_path: Path, config, key: str):
    folder = tiny.write_mistral(tmp_path, config, tiny.random_tensors(config), **{key: {"a": 1}})
    with pytest.raises(WeightsError, match=f"`{key}`"):
        open_backbone(folder)


def test_gguf_files_that_we_do_not_compute_are_refused(tmp_path: Path, config):
    tensors = tiny.random_tensors(config)
    file = tiny.write_gguf(tmp_path / "b.gguf", config, tensors, architecture="gemma")
    with pytest.raises(WeightsError, match=r"'gemma'; ARC-DS reads GGUF files of llama, mistral3, qwen2"):
        open_backbone(file)
    file = tiny.write_gguf(tmp_path / "a.gguf", config, tensors, rope_divisors=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    with pytest.raises(WeightsError, match="not the llama3 scaling"):
        open_backbone(file)
    assert open_backbone(file, "none").config.rope_scaling is None
    with pytest.raises(WeightsError, match=r"holds 2 GGUF models \(a.gguf, b.gguf\)"):
        open_backbone(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "more", "message"),
    [
        ({"llama.expert_count": 8}, {}, "`expert_count` is 8"),
        ({"llama.attention.value_length": 4}, {}, "`attention.value_length` is 4"),
        ({"llama.attention.head_count": [4, 2]}, {}, "expected `attention.head_count` to be a whole number"),
        ({"llama.rope.scaling.type": "dynamic"}, {}, "`rope.scaling.type` is 'dynamic'; expected none, linear"),
        ({"llama.rope.scaling.type": "linear"}, {}, "expected `rope.scaling.factor` to be a number above 0"),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.attn_factor": 3.0},
            {},
            "attn_factor` is 3.0; expected 1 or 1.1386",
        ),
        ({"llama.rope.scaling.type": "yarn"}, {}, "expected `rope.scaling.original_context_length` to be a whole"),
        ({"llama.attention.temperature_scale": 0.5}, {}, "`attention.temperature_scale` is 0.5"),
        ({}, {"rope_factors_long.weight": torch.ones(4)}, "`rope_factors_short.weight` with 4 numbers, got None"),
        ({"llama.attention.sliding_window": 9, "llama.attention.sliding_window_pattern": [True]}, {}, "of 2 flags"),
    ],
    ids=str,
)
def test_gguf_settings_that_we_do_not_compute_are_refused(tmp_path: Path, config, metadata, more, message: str):
    if "type" in str(metadata) and "linear" not in str(metadata):
        metadata = {"llama.rope.scaling.factor": 4.0, **metadata}
    tensors = tiny.random_tensors(config)
    file = tiny.write_gguf(tmp_path / "a.gguf", config, tensors, metadata=metadata, more=more)
    with pytest.raises(WeightsError, match=message):
        open_backbone(file)
    if "rope" in message:
        assert open_backbone(file, "none").config.rope_scaling is None


def test_hugging_face_weights_next_to_params_json_are_named(tmp_path: Path, config):
    """The folder of OLMo-1 in the reference's instructions has these two files; other models need config.json."""
    folder = tiny.write_hf(tmp_path, config, tiny.random_tensors(config))
    (folder / "config.json").unlink()
    (folder / "params.json").write_text(json.dumps(tiny.llama_params(config)))
    with pytest.raises(WeightsError, match="probably a Hugging Face name.*config.json with model.safetensors"):
        open_backbone(folder)


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
    with pytest.raises(WeightsError, match="config.json:1: not valid JSON"):
        open_backbone(tmp_path)


def test_a_pickle_whose_damage_confuses_torch_is_named(tmp_path: Path, config) -> None:
    """torch.load does not document the exceptions of its unpickler: here KeyError and IndexError."""
    folder = tiny.write_llama_pickles(tmp_path, config, tiny.random_tensors(config), 1)
    path = folder / "consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    for damaged in (b"\x80\x02h\x07.", b"\x80\x02."):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in parts.items():
                archive.writestr(name, damaged if name.endswith("data.pkl") else content)
        with pytest.raises(WeightsError, match=r"consolidated.00.pth cannot be mapped .*Copy it again"):
            open_backbone(folder)

"""Every layout returns the tensors that were written, by internal name, with half-split rotary rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from arc_ds.errors import WeightsError
from arc_ds.model.backbone_config import RopeScaling
from arc_ds.model.rope import rope_frequencies
from arc_ds.model.weights import beyond_layers, open_backbone, permute_rotary, read_backbone_config
from arc_ds.model.weights.gguf_store import GgufStore
from arc_ds.model.weights.names import spread_rotary
from arc_ds.tokenizers import find_tokenizer
from tests.helpers import tiny_models as tiny

LLAMA3 = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)


def assert_same(source, tensors) -> None:
    assert source.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, expected in tensors.items():
        found = source.tensor(name)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected), name
        count = len(expected)
        for rows in (slice(count // 3, count - count // 4), slice(count // 2, count)):  # as a rank of ZeRO-3 reads
            assert torch.equal(source.tensor(name, rows), expected[rows]), (name, rows)


@given(num_heads=st.integers(1, 6), pairs=st.integers(1, 8), width=st.integers(1, 3), seed=st.integers(0, 99))
def test_rotary_permutation_is_undone_by_its_inverse(num_heads, pairs, width, seed):
    weight = torch.randn(num_heads * pairs * 2, width, generator=torch.Generator().manual_seed(seed))
    other = permute_rotary(weight, num_heads, to="interleaved")
    assert torch.equal(permute_rotary(other, num_heads, to="half"), weight)
    assert torch.equal(other, tiny.interleaved(weight, num_heads))


def test_rotary_permutation_refuses_heads_of_odd_size():
    with pytest.raises(ValueError, match="even head_dim"):
        permute_rotary(torch.zeros(6, 2), 2, to="half")


def test_a_partly_rotated_head_has_its_turning_rows_first_in_both_halves():
    head = torch.arange(10.0)  # pairs (0, 2) and (1, 3) turn, 4 to 9 do not
    expected = [0, 1, 4, 5, 6, 2, 3, 7, 8, 9]
    two_heads = torch.cat([head, 100 + head])
    assert spread_rotary(two_heads, 2, 4).tolist() == [*expected, *(100 + n for n in expected)]
    assert torch.equal(spread_rotary(two_heads[:, None].expand(20, 3), 2, 4)[:, 1], spread_rotary(two_heads, 2, 4))


LONGROPE = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
LLAMA3_KEYS = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
# Keys that transformers 4 writes -> keys that transformers 5 writes.
OLD_AND_NEW = [
    ("llama", {"rope_theta": 5e5, "rope_scaling": None}, {"rope_parameters": {"rope_theta": 5e5}}),
    (
        "smollm3",
        {"rope_theta": 5e5, "rope_scaling": LLAMA3_KEYS},
        {"rope_parameters": {**LLAMA3_KEYS, "rope_theta": 5e5}},
    ),
    (
        "qwen2",
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}, "max_position_embeddings": 64},
    ),
    (
        "phi3",
        {
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {**LONGROPE, "rope_type": None, "type": "su", "factor": None},
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 16,
        },
        {
            "rope_parameters": {**LONGROPE, "rope_theta": 1e4, "partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 16,
        },
    ),
    (
        "olmo3",
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            }
        },
    ),
]


@pytest.mark.parametrize(("family", "old", "new"), OLD_AND_NEW, ids=[family for family, *_ in OLD_AND_NEW])
def test_both_generations_of_configs_mean_the_same(tmp_path: Path, family: str, old: dict, new: dict):
    configs = []
    for changes in (old, new):
        plain = {**tiny.hf_config(tiny.tiny_config(family=family)), **changes}
        if changes is new:
            plain.pop("rope_theta")
        (tmp_path / "config.json").write_text(json.dumps(plain))
        configs.append(read_backbone_config(tmp_path))
    assert configs[0] == configs[1]
    unscaled = read_backbone_config(tmp_path, "none")
    assert unscaled.rope_scaling is None and (configs[0] == unscaled) == (family == "llama")
    assert (configs[0].rope_scaling == LLAMA3) == (family == "smollm3")
    assert configs[0].rope_theta == unscaled.rope_theta == old["rope_theta"]


@pytest.mark.parametrize(
    ("family", "changes", "window", "layers"),
    [
        ("mistral", {}, 4096, (0, 1)),  # a missing key has the default of the family's class
        ("mistral", {"sliding_window": None}, None, ()),
        ("mistral", {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}, 8, (1,)),
        ("qwen2", {"sliding_window": 8}, None, ()),  # use_sliding_window is false
        ("qwen3", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, 8, (1,)),
        ("olmo3", {"num_hidden_layers": 4, "sliding_window": 8}, 8, (0, 1, 2)),
        ("smollm3", {"sliding_window": 8, "use_sliding_window": True, "no_rope_layers": [1, 0]}, 8, (1,)),
        ("llama", {"sliding_window": 8}, None, ()),  # transformers ignores the key, too
    ],
)
def test_windows_are_those_of_transformers(tmp_path: Path, family: str, changes: dict, window, layers):
    (tmp_path / "config.json").write_text(json.dumps({**tiny.hf_config(tiny.tiny_config(family=family)), **changes}))
    config = read_backbone_config(tmp_path)
    assert (config.window, config.windowed_layers) == (window, layers)


def test_olmo_s_own_config_clips_queries_keys_and_values(tmp_path: Path):
    config = tiny.tiny_config(family="olmo", norm="layer", num_kv_heads=4)
    folder = tiny.write_olmo(tmp_path, config, tiny.random_tensors(config), layout="hf_olmo")
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**plain, "clip_qkv": 8.0}))
    assert open_backbone(folder).config == dataclasses.replace(config, clip_qkv=8.0)


def test_rules_of_layers_that_cannot_be_computed_are_refused(tmp_path: Path):
    rules = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    plain = tiny.hf_config(tiny.tiny_config(family="olmo3"))
    (tmp_path / "config.json").write_text(json.dumps({**plain, "rope_parameters": rules}))
    with pytest.raises(WeightsError, match="`rope_parameters` to be one rule, or no scaling in layers with a window"):
        read_backbone_config(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "num_files"), [({}, 1), ({}, 3), ({"tie_embeddings": True}, 1), ({"head_dim": 12}, 1)]
)
def test_hugging_face_folder_reads_exactly(tmp_path: Path, sizes: dict, num_files: int):
    config = tiny.tiny_config(**sizes)
    tensors = tiny.random_tensors(config, dtype=torch.bfloat16)
    source = open_backbone(tiny.write_hf(tmp_path, config, tensors, num_files))
    assert source.config == config
    assert_same(source, tensors)


def test_tensors_that_follow_from_the_config_are_harmless(tmp_path: Path):
    """Buffers of early files, and biases of zeros."""
    config = tiny.tiny_config(rope_theta=1e6)
    tensors = tiny.random_tensors(config)
    folder = tiny.write_hf(tmp_path, config, tensors)
    frequencies = rope_frequencies(config, torch.device("cpu"))
    layer = "model.layers.0.self_attn"
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        more = {f"{layer}.rotary_emb.inv_freq": frequencies.to(dtype), f"{layer}.q_proj.bias": torch.zeros(32)}
        save_file(more, folder / "more.safetensors")
        assert_same(open_backbone(folder), tensors)


PREFIXES = [
    (tiny.write_hf, {}, {"model.": ""}),
    (tiny.write_hf, {}, {"model.": "module.model.", "lm_head": "module.lm_head"}),
    (tiny.write_hf, {}, {"model.": "base_model.model.model.", "lm_head": "base_model.model.lm_head"}),
    (tiny.write_hf, {}, {"model.": "model.language_model."}),
    (tiny.write_mistral, {"family": "mistral"}, {"": "_orig_mod."}),
    (tiny.write_olmo, {"family": "olmo", "norm": "layer", "num_kv_heads": 4}, {"model.": ""}),
]


@pytest.mark.parametrize(("write", "sizes", "prefixes"), PREFIXES)
def test_one_other_prefix_of_all_names_is_read(tmp_path: Path, write: Callable, sizes: dict, prefixes: dict):
    """Wrappers and sentence encoders use other prefixes. The head may have its own."""
    config = tiny.tiny_config(**sizes)
    tensors = tiny.random_tensors(config)
    folder = write(tmp_path, config, tensors)
    (file,) = folder.glob("*.safetensors")
    renamed = {}
    for name, tensor in load_file(file).items():
        old, new = next((pair for pair in prefixes.items() if name.startswith(pair[0])), ("", ""))
        renamed[new + name.removeprefix(old)] = tensor.clone()
    save_file(renamed, file)
    assert_same(open_backbone(folder), tensors)


@pytest.mark.parametrize("write", [tiny.write_hf, tiny.write_mistral])
def test_encoder_needs_no_head_and_no_later_layer(tmp_path: Path, write: Callable):
    config = tiny.tiny_config(family="mistral")
    tensors = tiny.random_tensors(config)
    kept = {name: tensor for name, tensor in tensors.items() if not beyond_layers(1)(name)}
    folder = write(tmp_path, config, kept)
    source = open_backbone(folder, is_unused=beyond_layers(1))
    assert all(torch.equal(source.tensor(name), tensor) for name, tensor in kept.items())
    with pytest.raises(WeightsError, match=r"layers\.1\..* is missing"):
        open_backbone(folder, is_unused=beyond_layers(2))


def test_encoder_may_carry_the_head_of_another_task(tmp_path: Path):
    config = tiny.tiny_config()
    folder = tiny.write_hf(tmp_path, config, tiny.random_tensors(config))
    save_file({"score.weight": torch.ones(2, 32)}, folder / "more.safetensors")
    assert open_backbone(folder, is_unused=beyond_layers(2)).config == config


@pytest.mark.parametrize(("num_files", "vocab_size"), [(1, 40), (2, 40), (4, -1)])
def test_meta_shards_are_joined_along_the_right_dimensions(tmp_path: Path, num_files: int, vocab_size: int):
    config = tiny.tiny_config(num_kv_heads=4)
    tensors = tiny.random_tensors(config)
    folder = tiny.write_llama_pickles(tmp_path, config, tensors, num_files, vocab_size=vocab_size)
    source = open_backbone(folder)
    assert source.config == config
    assert_same(source, tensors)
    assert source.tensor("output.weight", slice(4, 4)).shape == (0, 32)


def test_meta_scaled_rope_takes_the_factor_of_its_width(tmp_path: Path):
    config = tiny.tiny_config()
    folder = tiny.write_llama_pickles(tmp_path, config, tiny.random_tensors(config), 1, use_scaled_rope=True)
    assert open_backbone(folder).config.rope_scaling == LLAMA3
    assert open_backbone(folder, "none").config.rope_scaling is None
    wide = tmp_path / "wide"
    wide.mkdir()
    (wide / "params.json").write_text((folder / "params.json").read_text().replace('"dim": 32', '"dim": 4096'))
    assert read_backbone_config(wide).rope_scaling.factor == 8.0


@pytest.mark.parametrize(
    ("changes", "theta"),
    [({}, 10000.0), ({"rope_theta": None}, 1e6), ({"rope_theta": None, "sliding_window": 64}, 1e4)],
)
def test_mistral_folder_reads_exactly_with_its_default_base(tmp_path: Path, changes: dict, theta: float):
    window = changes.get("sliding_window")
    windowed_layers = () if window is None else (0, 1)
    config = tiny.tiny_config(family="mistral", rope_theta=theta, window=window, windowed_layers=windowed_layers)
    tensors = tiny.random_tensors(config)
    source = open_backbone(tiny.write_mistral(tmp_path, config, tensors, **changes))
    assert source.config == config
    assert_same(source, tensors)


@pytest.mark.parametrize("layout", ["hf_olmo", "consolidated", "model"])
def test_olmo_stacked_projections_are_taken_apart(tmp_path: Path, layout: str):
    config = tiny.tiny_config(family="olmo", norm="layer", num_kv_heads=4)
    tensors = tiny.random_tensors(config)
    source = open_backbone(tiny.write_olmo(tmp_path, config, tensors, layout))
    assert source.config == config
    assert_same(source, tensors)


def test_gguf_file_reads_exactly_and_knows_its_tokenizer(tmp_path: Path):
    config = tiny.tiny_config(norm_eps=2.0**-16, tie_embeddings=True)
    tensors = tiny.random_tensors(config)
    file = tiny.write_gguf(tmp_path / "tiny.gguf", config, tensors)
    for path in (file, tmp_path):
        source = open_backbone(path)
        assert source.config == config
        assert find_tokenizer(source.path) == file
        assert_same(source, tensors)


@pytest.mark.parametrize(
    ("changes", "window", "layers"),
    [
        ({"sliding_window": [None, 64]}, 64, (1, 3)),
        ({"_sliding_window": [128, 64, 64, 64]}, 64, (1, 2, 3)),
        ({"sliding_window": [64]}, 64, (0, 1, 2, 3)),
        ({"sliding_window": [None]}, None, ()),
    ],
    ids=str,
)
def test_ministral_windows_repeat_over_the_layers(tmp_path: Path, changes: dict, window: int | None, layers: tuple):
    sizes = {"num_layers": 4, "window": window, "windowed_layers": layers}
    config = tiny.tiny_config(family="mistral", **sizes)
    source = open_backbone(tiny.write_mistral(tmp_path, config, tiny.random_tensors(config), **changes))
    assert source.config == config


BLOCK_FORMATS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"]


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_gguf_blocks_are_dequantised_as_gguf_does(tmp_path: Path, name: str):
    """Any bytes are blocks of every format. Bytes below 0x7c make finite scales."""
    import gguf

    kind = gguf.GGMLQuantizationType[name]
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 0x7C, (6, 512 // block_size * block_bytes), np.uint8)
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "llama")
    writer.add_tensor("other", np.ones(3, np.float32))
    writer.add_tensor("matrix", blocks, raw_dtype=kind)
    tiny.finish_gguf(writer)
    store = GgufStore([tmp_path / "a.gguf"])
    expected = gguf.dequantize(blocks, kind)
    assert store.shapes == {"other": (3,), "matrix": (6, 512)} and expected.shape == (6, 512)
    for rows in (slice(None), slice(2, 5)):
        found = store.tensor("matrix", rows)
        assert found.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(name, torch.float32)
        assert np.array_equal(found.float().numpy().view(np.int32), expected[rows].view(np.int32))
    assert not np.array_equal(expected[:3].view(np.int32), expected[2:5].view(np.int32))


def test_gguf_backbone_of_blocks_reads_row_for_row(tmp_path: Path):
    import gguf

    config = tiny.tiny_config()
    tensors = tiny.random_tensors(config)
    source = open_backbone(tiny.write_gguf(tmp_path / "tiny.gguf", config, tensors, quantise="Q8_0"))
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in tensors.items():
        expected = tensor
        if tensor.ndim == 2:
            expected = torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.numpy(), kind), kind))
            assert not torch.equal(expected, tensor)
        assert torch.equal(source.tensor(name), expected), name


def test_every_part_of_a_split_gguf_model_opens_all_of_it(tmp_path: Path):
    config = tiny.tiny_config(norm_eps=2.0**-16)
    tensors = tiny.random_tensors(config)
    tiny.write_gguf(tmp_path / "tiny.gguf", config, tensors, max_tensors=8)
    parts = sorted(tmp_path.iterdir())
    assert [part.name for part in parts] == [f"tiny-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for path in (tmp_path, *parts):
        source = open_backbone(path)
        assert source.config == config and source.path == parts[0]
        assert_same(source, tensors)


def test_wrong_parts_of_a_split_gguf_model_are_named(tmp_path: Path):
    config = tiny.tiny_config()
    tiny.write_gguf(tmp_path / "tiny.gguf", config, tiny.random_tensors(config), max_tensors=8)
    first, second, third = sorted(tmp_path.iterdir())
    content = second.read_bytes()
    second.unlink()
    for path in (tmp_path, first, third):
        with pytest.raises(WeightsError, match=r"has 3 files, but tiny-00002-of-00003\.gguf is missing"):
            open_backbone(path)
    second.write_bytes(third.read_bytes())
    with pytest.raises(WeightsError, match=r"is part 3 of 3; expected part 2 of 3.*-00003-of-00003\.gguf"):
        open_backbone(tmp_path)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "tiny.gguf").write_bytes(first.read_bytes())
    with pytest.raises(WeightsError, match=r"is part 1 of 3; expected part 1 of 1.*-00001-of-00003\.gguf"):
        open_backbone(alone)
    other = tmp_path / "other"
    other.mkdir()
    tiny.write_gguf(other / "tiny.gguf", config, tiny.random_tensors(config), max_tensors=9)
    second.write_bytes(sorted(other.iterdir())[1].read_bytes())
    with pytest.raises(WeightsError, match=r"tensors, expected \d+\. They belong to different models|differ"):
        open_backbone(tmp_path)
    second.write_bytes(content)
    open_backbone(tmp_path)


def test_gguf_rope_factors_become_llama3_scaling(tmp_path: Path):
    config = tiny.tiny_config(norm_eps=2.0**-16, rope_theta=500000.0, rope_scaling=LLAMA3)
    plain = dataclasses.replace(config, rope_scaling=None)
    divisors = rope_frequencies(plain, torch.device("cpu")) / rope_frequencies(config, torch.device("cpu"))
    assert divisors.max() == 32.0 and divisors.min() == 1.0  # otherwise the test proves nothing
    file = tiny.write_gguf(tmp_path / "a.gguf", config, tiny.random_tensors(config), rope_divisors=divisors)
    assert open_backbone(file).config == config
    assert open_backbone(file, "none").config.rope_scaling is None


@pytest.mark.parametrize(
    ("name", "family"),
    [("enc", "llama"), ("decM", "mistral"), ("decL", "llama"), ("decO", "olmo"), ("decS", "mistral")],
)
def test_golden_models_open(golden: Path, name: str, family: str):
    source = open_backbone(golden / "models" / name, "none")
    assert source.config.family == family
    assert all(tuple(source.tensor(name).shape) == shape for name, shape in source.shapes.items())


def test_sizes_are_read_without_weights(tmp_path: Path):
    config = tiny.tiny_config()
    tiny.write_hf(tmp_path / "hf", config, tiny.random_tensors(config))
    (tmp_path / "hf" / "model.safetensors").unlink()
    assert read_backbone_config(tmp_path / "hf") == config
    tiny.write_llama_pickles(tmp_path / "meta", config, tiny.random_tensors(config), 1)
    (tmp_path / "meta" / "consolidated.00.pth").unlink()
    assert read_backbone_config(tmp_path / "meta") == config

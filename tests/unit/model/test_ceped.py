"""CEPED's files and contexts. `parity/test_golden_ceped.py` has its numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from arc_ds.errors import WeightsError
from arc_ds.model.ceped import Ceped, load_ceped
from arc_ds.model.weights.ceped_files import read_ceped_config
from tests.helpers.tiny_ceped import write_tiny_ceped

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_ceped(tmp_path / "ceped", vocab_size=40)


def _load(folder: Path) -> Ceped:
    return load_ceped(folder, CPU, torch.float32)


def _values(model: Ceped) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def test_bin_shards_give_the_same_weights(folder: Path) -> None:
    expected = _values(_load(folder))
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    for shard, part in enumerate((names[::2], names[1::2]), start=1):
        torch.save({name: tensors[name] for name in part}, folder / f"pytorch_model-0000{shard}-of-00002.bin")
    (folder / "model.safetensors").unlink()
    found = _values(_load(folder))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_pickle_with_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "ran",)

    (folder / "model.safetensors").unlink()
    torch.save({"a": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="a pickle can run code"):
        _load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_cross_attention": False}, "no CEPED model"),
        ({"num_cross_attn_hidden_states": 2}, "num_cross_attn_hidden_states"),
        ({"encoder_is_model": True}, "encoder_is_model"),
        ({"encode_mode": "both"}, "encode_mode"),
        ({"encoder_hidden_size": 8}, "the encoder's hidden_size 16; it is 8"),
        ({"num_cross_attn_layers": 3}, "at most the 2 layers; it is 3"),
        ({"encoder_config": None}, "expected `encoder_config` to be an object"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
    ],
)
def test_a_config_of_another_model_is_refused(folder: Path, change: dict, message: str) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
    with pytest.raises(WeightsError, match=message):
        _load(folder)


def test_missing_other_and_unknown_tensors_are_named_as_in_the_file(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.cross_attn.q_proj.weight"]
    tensors["encoder.norm.weight"] = torch.ones(8)
    tensors["model.layers.0.cross_attn.q_proj.weight"] = torch.ones(32, 32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # follows from the config
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError) as error:
        _load(folder)
    for phrase in (
        "`model.layers.1.cross_attn.q_proj.weight` is missing",
        "`encoder.norm.weight` is [8], expected [16]",
        "`model.layers.0.cross_attn.q_proj.weight` is no part of it",
    ):
        assert phrase in str(error.value)
    assert "inv_freq" not in str(error.value)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="no weights"):
        _load(folder)


def test_the_published_model_has_its_number_of_tensors_and_parameters(tmp_path: Path) -> None:
    encoder = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "rms_norm_eps": 1e-6,
        "vocab_size": 32001,
    }
    config = {
        "model_type": "llama",
        "do_cross_attention": True,
        "encoder_config": encoder,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "rms_norm_eps": 1e-5,
        "vocab_size": 32000,
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.device("meta"):
        parameters = list(Ceped(read_ceped_config(tmp_path)).parameters())
    assert len(parameters) == 669 and sum(map(torch.Tensor.numel, parameters)) == 8_516_196_352


def test_a_sequence_without_context_cannot_be_encoded(folder: Path) -> None:
    with pytest.raises(ValueError, match="sequence 1 has no context"):
        _load(folder).encode([[[1, 2], [3]], [[]]])


def test_an_empty_chunk_changes_nothing(folder: Path) -> None:
    model = _load(folder)
    one, other = model.encode([[[1, 2], [3]]]), model.encode([[[1, 2], [], [3]]])
    assert torch.equal(one.states, other.states) and one.cu_seqlens.tolist() == other.cu_seqlens.tolist() == [0, 3]

"""`arc-ds import`: a release as downloaded becomes an ARC checkpoint with the same bytes, or all faults are listed."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from arc_ds import ArcModel
from arc_ds.batch.groups import GroupRule
from arc_ds.cli import main
from arc_ds.commands.import_ import recipe
from arc_ds.config.load import load_config
from arc_ds.errors import WeightsError
from arc_ds.inference.load import open_arc_folder
from arc_ds.launch.exit_codes import EXIT_USER_ERROR
from arc_ds.model.weights import read_backbone_config, write_arc_checkpoint
from arc_ds.model.weights.arc_spec import params_of_spec
from arc_ds.model.weights.lazy_tensor import lazy_rows
from arc_ds.model.weights.release import LLAMA_32_3B, open_release
from arc_ds.model.weights.stores import SafetensorsStore
from arc_ds.training.build_model import compressor_spec, open_starting_weights
from tests.helpers import tiny_models as tiny
from tests.helpers.tiny_data import write_tiktoken
from tests.helpers.tiny_export import ENCODER, tiny_trained, write_decoder

PARTS = {"embedder": "embedder/consolidated.safetensors", "bridge_module": "bridge_module/consolidated.safetensors"}
LLAMA_32_3B_PARAMS = {  # published by Meta
    "dim": 3072, "ffn_dim_multiplier": 1.0, "multiple_of": 256, "n_heads": 24, "n_kv_heads": 8, "n_layers": 28,
    "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True, "vocab_size": 128256,
}  # fmt: skip


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    """The folder of a tiny encoder's backbone, without its weights."""
    folder = tmp_path / "backbone"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny.hf_config(ENCODER)))
    write_tiktoken(folder / "tokenizer.model")
    return folder


def write_release(folder: Path, **changes: Any) -> Mapping[str, Tensor]:
    """Write a release with random weights under the released names, and its ARC checkpoint. Returns its tensors."""
    trained = tiny_trained(folder.parent / "run", **changes)
    tensors = {name: tensor.bfloat16() for name, tensor in trained.tensors.items()}
    checkpoint = folder.parent / "checkpoint"
    checkpoint.mkdir()
    write_arc_checkpoint(checkpoint, params_of_spec(trained.spec, "bfloat16"), tensors, trained.spec.backbone)
    released = {}
    for prefix, file in PARTS.items():
        released |= {f"{prefix}.{name}": tensor for name, tensor in load_file(checkpoint / file).items()}
    folder.mkdir()
    save_file(released, folder / "model.safetensors")
    return released


@pytest.mark.parametrize("num_decoders", [1, 2])
def test_a_release_becomes_a_checkpoint_with_the_same_bytes(
    tmp_path: Path, backbone: Path, num_decoders: int, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "ARC8_Encoder_multi" if num_decoders == 2 else "ARC8_Encoder_Mistral"
    released, out = write_release(tmp_path / name, decoder_sizes=(48,) * num_decoders), tmp_path / "out"
    assert ("bridge_module.0.layer1.weight" in released) == (num_decoders == 2)
    command = ["import", str(tmp_path / name), str(out), "--encoder-backbone", str(backbone), "--pooling-factor=4"]
    assert main(command) == 0
    names = ["llama31_8b", "mistral_7b"][-num_decoders:]
    assert f"for {', '.join(names)}. Recipe: {out}/finetune.yaml" in capsys.readouterr().out
    for prefix, file in PARTS.items():
        written = load_file(out / file)
        assert {f"{prefix}.{n}" for n in written} == {n for n in released if n.startswith(f"{prefix}.")}
        for n, tensor in written.items():
            assert torch.equal(tensor.view(torch.int16), released[f"{prefix}.{n}"].view(torch.int16)), n
    for file in ("params.json", "encoder_backbone.json"):
        assert (out / file).read_text() == (tmp_path / "checkpoint" / file).read_text(), file
    opened = open_arc_folder(out)
    assert [settings.name for settings in opened.decoders] == names and opened.texts_apart
    assert {settings.rope_scaling for settings in opened.decoders} == {"none"}
    ours = ArcModel.from_checkpoint(out, [])
    theirs = ArcModel.from_checkpoint(tmp_path / "checkpoint", [], encoder_backbone=backbone)
    for decoder in range(num_decoders):
        assert torch.equal(ours.compress(["the sea"], decoder)[0], theirs.compress(["the sea"], decoder)[0])
    assert main(command) == EXIT_USER_ERROR and "exists already. Choose another folder.\n" in capsys.readouterr().err


def test_the_recipe_loads_and_starts_from_the_import(
    tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_release(tmp_path / "release", decoder_sizes=(48, 48))
    names = ["--decoder=first", "--decoder=second"]
    main(["import", str(tmp_path / "release"), str(tmp_path / "out"), f"--encoder-backbone={backbone}", *names])
    for name in ("first", "second"):
        write_decoder(tmp_path / "models" / name)
    for variable, folder in (("ENCODER", backbone), ("MODELS", tmp_path / "models"), ("SHARDS", tmp_path)):
        monkeypatch.setenv(variable, str(folder))
    config = load_config(tmp_path / "out" / "finetune.yaml")
    assert [decoder.name for decoder in config.decoders] == ["first", "second"]
    assert config.pooling.factors == (8,) and config.encoder.rope_scaling == "none"
    spec = compressor_spec(config)
    weights = open_starting_weights(config, spec)
    assert spec == open_arc_folder(tmp_path / "out").spec and weights.plan.sources == (0, 1)


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        (
            {"embedder.layers.0.attention.wq.weight": None, "embedder.cont_tok.0.weight": torch.ones(1, 31)},
            ["`encoder.layers.0.attention.wq.weight` is missing", r"`ports.0.cont` is \[1, 31\], expected \[1, 32\]"],
        ),
        (
            {"embedder.layers.0.attention.wq.bias": torch.ones(32), "llm.output.weight": torch.ones(2),
             "bridge_module.layer3.weight": torch.ones(2)},
            ["`bridge_module.layer3.weight` is not a name", "`llm.output.weight` is not a name", "wq.bias` has no"],
        ),
        ({"embedder.layers.7.attention.wq.weight": torch.ones(32, 32)}, ["has 8 layers, but the backbone has 2"]),
        ({"embedder.rec_tok.1.weight": torch.ones(1, 32)}, ["`ports.1.cont` is missing"]),
    ],
)  # fmt: skip
def test_all_faults_of_a_release_are_listed(
    tmp_path: Path, backbone: Path, change: dict[str, Tensor | None], faults: list[str]
) -> None:
    tensors = {**write_release(tmp_path / "release"), **change}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, tmp_path / "release" / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        open_release(tmp_path / "release", read_backbone_config(backbone, "none"))
    for fault in faults:
        assert re.search(fault, str(caught.value)), (fault, str(caught.value))


def test_a_release_of_another_backbone_names_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_release(tmp_path / "release")
    assert main(["import", str(tmp_path / "release"), str(tmp_path / "out")]) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert "expected [128256, 3072]" in error and "--encoder-backbone FOLDER" in error
    assert error.count("layers.0.") == 9, "all faults are listed"
    assert not (tmp_path / "out").exists()


def test_names_of_decoders_must_be_as_many_as_the_bridges(
    tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_release(tmp_path / "release", decoder_sizes=(48, 48))
    command = ["import", str(tmp_path / "release"), str(tmp_path / "out"), f"--encoder-backbone={backbone}"]
    for names in (["--decoder=a"], ["--decoder=a", "--decoder=a"]):
        assert main([*command, *names]) == EXIT_USER_ERROR
        assert "serves 2 decoders" in capsys.readouterr().err
    assert main([*command, "--decoder=a", "--decoder=b/c"]) == EXIT_USER_ERROR
    assert "--decoder 'b/c': expected letters, digits" in capsys.readouterr().err
    assert main(command) == 0 and "for decoder0, decoder1" in capsys.readouterr().out


def test_settings_of_a_config_json_are_taken(tmp_path: Path, backbone: Path) -> None:
    write_release(tmp_path / "release")
    pooling = {"pool_type": "last", "where": "before"}
    settings = {"compress_rates": [-2], "causal_embedder": True, "pooling_module": pooling}
    (tmp_path / "release" / "config.json").write_text(json.dumps({"pipeline_args": {"embedder_params": settings}}))
    spec = open_release(tmp_path / "release", read_backbone_config(backbone, "none")).spec
    assert (spec.strategy, spec.causal, spec.pooled_queries, spec.rules[0].value) == ("last", True, False, 2)


def test_the_recipe_has_the_groups_of_the_release(tmp_path: Path) -> None:
    """A config has factors, or a number of groups."""
    spec = tiny_trained(tmp_path, rules=(GroupRule("count", 3),)).spec
    pooling = yaml.safe_load(recipe(spec, ["a"], tmp_path))["pooling"]
    assert pooling["num_groups"] == 3 and not pooling["factors"]
    assert "num_groups" not in yaml.safe_load(recipe(tiny_trained(tmp_path).spec, ["a"], tmp_path))["pooling"]


def test_a_release_as_downloaded_is_sent_to_the_import(tmp_path: Path, backbone: Path) -> None:
    write_release(tmp_path / "release")
    for config in (None, {"model_type": "arc"}):
        if config is not None:
            (tmp_path / "release" / "config.json").write_text(json.dumps(config))
        with pytest.raises(WeightsError, match=r"released encoder as downloaded.*arc-ds import \S+/release OUT"):
            ArcModel.from_checkpoint(tmp_path / "release", [])
    with pytest.raises(WeightsError, match="is not a released encoder"):
        open_release(backbone)


def test_built_in_sizes_are_those_of_the_published_file(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(LLAMA_32_3B_PARAMS))
    assert read_backbone_config(tmp_path, "none") == LLAMA_32_3B


@pytest.mark.parametrize("num_decoders", [1, 2])
def test_the_real_names_and_shapes_fit(tmp_path: Path, num_decoders: int) -> None:
    """A sparse file: 26 layers of Llama 3.2 3B, markers and bridges 3072 -> 2048 -> 4096, without any data."""
    layer = {
        "attention.wq": (3072, 3072), "attention.wk": (1024, 3072), "attention.wv": (1024, 3072),
        "attention.wo": (3072, 3072), "feed_forward.w1": (8192, 3072), "feed_forward.w2": (3072, 8192),
        "feed_forward.w3": (8192, 3072), "attention_norm": (3072,), "ffn_norm": (3072,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"embedder.tok_embeddings.weight": (128256, 3072)}
    shapes |= {f"embedder.layers.{i}.{name}.weight": shape for i in range(26) for name, shape in layer.items()}
    for n in range(num_decoders):
        number = f"{n}." if num_decoders > 1 else ""
        shapes |= {f"embedder.{marker}_tok.{n}.weight": (1, 3072) for marker in ("rec", "cont")}
        shapes[f"bridge_module.{number}layer1.weight"] = (2048, 3072)
        shapes[f"bridge_module.{number}layer2.weight"] = (4096, 2048)
    write_sparse(tmp_path / "model.safetensors", shapes)
    release = open_release(tmp_path)
    spec = release.spec
    assert (spec.num_layers, spec.decoder_sizes, spec.bridge_hidden_size) == (26, (4096,) * num_decoders, 2048)
    parameters = sum(map(math.prod, release.store.shapes.values()))
    assert parameters == 3_011_407_872 + num_decoders * 14_686_208
    shapes["embedder.layers.3.feed_forward.w2.weight"] = (3072, 8191)
    write_sparse(tmp_path / "model.safetensors", shapes)
    with pytest.raises(
        WeightsError, match=r"layers.3.feed_forward.w2.weight` is \[3072, 8191\], expected \[3072, 8192\]"
    ):
        open_release(tmp_path)


def write_sparse(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file in bfloat16 whose data is a hole in the file."""
    header, place = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + place)


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    write_sparse(tmp_path / "big.safetensors", {"a": (3, 5), "b": (6_000_000, 8)})
    tensor = lazy_rows(SafetensorsStore(tmp_path / "big.safetensors"), "b", torch.bfloat16)
    sizes = [block.numel() for block in tensor.blocks()]
    assert max(sizes) <= 1 << 20 and sum(sizes) == 48_000_000

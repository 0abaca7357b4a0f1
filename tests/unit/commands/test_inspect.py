"""`arc-ds inspect` says what weights are and what they serve as, and its exit code says whether they serve at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from arc_ds import cli
from arc_ds.commands.inspect import describe, inspect_path
from arc_ds.export.formats import write_export
from tests.helpers import tiny_models as tiny
from tests.helpers.tiny_data import write_json_tokenizer, write_tekken
from tests.helpers.tiny_export import ENCODER, tiny_trained
from tests.helpers.written import write_chat_tokenizer
from tests.unit.commands.test_import import write_release

CONFIG = tiny.tiny_config(vocab_size=350)
TENSORS = tiny.random_tensors(CONFIG, dtype=torch.bfloat16)
TENSORS_F32 = tiny.random_tensors(CONFIG)
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def hugging_face(folder: Path) -> Path:
    tiny.write_hf(folder, CONFIG, TENSORS, 2, max_position_embeddings=77)
    return write_chat_tokenizer(write_json_tokenizer(folder), template=TEMPLATE)


def test_a_hugging_face_folder_serves_in_every_way(tmp_path: Path) -> None:
    facts = inspect_path(hugging_face(tmp_path))
    assert facts["serves_as"] == {"encoder backbone": None, "decoder": None, "decoder through transformers": None}
    assert facts["kind"] == "Hugging Face folder" and facts["formats"] == {"BF16": len(TENSORS)}
    assert [file["name"] for file in facts["files"]] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert facts["bytes"] == sum((tmp_path / file["name"]).stat().st_size for file in facts["files"])
    assert facts["parameters"] == sum(tensor.numel() for tensor in TENSORS.values())
    assert facts["config"]["hidden_size"] == 32 and facts["max_positions"] == 77 and facts["chat_template"]
    assert facts["tokenizer"]["kind"] == "Hugging Face tokenizers" and "problem" not in facts["tokenizer"]
    assert "decoder through transformers: yes, if it passes the tests of loading" in describe(facts)
    assert "decoder: yes" in describe(facts) and "2 layers, width 32, 4 heads (2 of keys) of 8" in describe(facts)


WRITERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "Meta": (
        "folder of Meta, Mistral or OLMo with params.json",
        lambda folder: tiny.write_llama_pickles(folder, CONFIG, TENSORS, 2),
    ),
    "Mistral": (
        "folder of Meta, Mistral or OLMo with params.json",
        lambda folder: write_tekken(tiny.write_mistral(folder, CONFIG, TENSORS)),
    ),
    "GGUF": (
        "GGUF model",
        lambda folder: write_json_tokenizer(tiny.write_gguf(folder / "a.gguf", CONFIG, TENSORS_F32).parent),
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_other_containers_serve_natively(tmp_path: Path, name: str) -> None:
    kind, write = WRITERS[name]
    facts = inspect_path(write(tmp_path))
    assert facts["kind"] == kind and "config.json" in facts["serves_as"].pop("decoder through transformers")
    assert facts["serves_as"] == {"encoder backbone": None, "decoder": None}
    if name == "Mistral":
        assert Path(facts["tokenizer"]["path"]).name == "tekken.json"


def test_an_encoder_without_a_head_is_no_decoder(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in TENSORS.items() if name not in ("output.weight", "norm.weight")}
    facts = inspect_path(tiny.write_hf(tmp_path, CONFIG, tensors))
    assert facts["serves_as"]["encoder backbone"] is None
    assert "`lm_head.weight` is missing" in facts["serves_as"]["decoder"]


def test_a_tokenizer_with_more_ids_than_the_embedding_is_a_reason(tmp_path: Path) -> None:
    config = tiny.tiny_config(vocab_size=40)
    facts = inspect_path(write_json_tokenizer(tiny.write_hf(tmp_path, config, tiny.random_tensors(config))))
    assert "the embedding has only 40 rows" in facts["tokenizer"]["problem"]
    assert facts["serves_as"]["encoder backbone"] == facts["serves_as"]["decoder"] == facts["tokenizer"]["problem"]


def test_a_family_that_only_transformers_knows_serves_through_it(tmp_path: Path) -> None:
    tiny.write_hf(tmp_path, CONFIG, TENSORS, model_type="gpt_neox")
    facts = inspect_path(tmp_path)
    assert "'gpt_neox'" in facts["serves_as"]["encoder backbone"]
    assert facts["serves_as"]["decoder through transformers"] is None
    tiny.write_hf(tmp_path, CONFIG, TENSORS, model_type="nobody", auto_map={"AutoConfig": "x"})
    assert "trust_remote_code: true" in inspect_path(tmp_path)["serves_as"]["decoder through transformers"]


def half_downloaded(folder: Path) -> Path:
    file = tiny.write_hf(folder, CONFIG, TENSORS) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    return folder


def index_of_missing_files(folder: Path) -> Path:
    tiny.write_hf(folder, CONFIG, TENSORS, 2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    return folder


def damaged_config(folder: Path) -> Path:
    (tiny.write_hf(folder, CONFIG, TENSORS) / "config.json").write_text("{")
    return folder


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (half_downloaded, "cut short or damaged; copy it again"),
        (index_of_missing_files, "model-00002-of-00002.safetensors is missing"),
        (damaged_config, "not valid JSON"),
        (lambda folder: folder, "holds nothing"),
        (lambda folder: folder / "nowhere", "does not exist"),
    ],
)
def test_weights_that_serve_as_nothing_exit_with_2_and_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture, write: Callable[[Path], Path], reason: str
) -> None:
    path = write(tmp_path)
    assert cli.main(["inspect", str(path), "--json"]) == 2
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["serves_as"]) == 3 and None not in facts["serves_as"].values()
    assert reason in facts["serves_as"]["decoder"]
    assert cli.main(["inspect", str(path)]) == 2
    text = capsys.readouterr().out
    assert f"encoder backbone, decoder, decoder through transformers: no. {facts['serves_as']['decoder']}" in text


@pytest.mark.parametrize(("export_format", "kind"), [("arc-ds", "export of ARC-DS"), ("arc", "ARC checkpoint")])
def test_an_export_says_what_it_holds(tmp_path: Path, export_format: str, kind: str, capsys) -> None:
    trained = tiny_trained(tmp_path / "run", decoder_sizes=(48, 48), chat_templates=("llama2", None))
    write_export(trained, tmp_path / "out", export_format=export_format)
    facts = inspect_path(tmp_path / "out")
    assert facts["kind"] == kind and facts["serves_as"] == {"compressor": None}
    assert facts["encoder"] == {"family": "llama", "num_layers": 1, "hidden_size": ENCODER.hidden_size, "causal": False}
    assert facts["pooling"]["rules"] == ["factor 4"] and facts["bridge"] == {"kind": "mlp", "hidden_size": 24}
    assert [decoder["name"] for decoder in facts["decoders"]] == ["decoder0", "decoder1"]
    parts = ["bridge_module/consolidated.safetensors", "embedder/consolidated.safetensors"]
    assert [file["name"] for file in facts["files"]] == (parts if export_format == "arc" else ["model.safetensors"])
    assert [decoder["chat_template"] for decoder in facts["decoders"]] == ["llama2", None]
    assert facts["parameters"] == sum(tensor.numel() for tensor in trained.tensors.values())
    assert facts["step"] == (7 if export_format == "arc-ds" else None)
    assert cli.main(["inspect", str(tmp_path / "out")]) == 0
    assert "decoders            name decoder0, hidden size 48" in capsys.readouterr().out
    next((tmp_path / "out").rglob("*.safetensors")).unlink()
    assert cli.main(["inspect", str(tmp_path / "out")]) == 2


def test_checkpoints_of_the_reference_need_the_sizes_of_their_backbone(golden: Path) -> None:
    checkpoint = next((golden / "arc_checkpoints" / "arc_multi" / "checkpoints").iterdir())
    assert "encoder_backbone" in inspect_path(checkpoint)["serves_as"]["compressor"]
    facts = inspect_path(checkpoint, golden / "models" / "enc")
    assert facts["serves_as"] == {"compressor": None} and len(facts["decoders"]) == 2


def test_a_release_says_what_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    release, backbone = tmp_path / "release", tmp_path / "backbone"
    write_release(release)
    backbone.mkdir()
    (backbone / "config.json").write_text(json.dumps(tiny.hf_config(ENCODER)))
    (release / "config.json").write_text("{}")
    for path in (release, release / "model.safetensors"):
        facts = inspect_path(path, backbone)
        assert facts["kind"] == "released ARC-Encoder of the reference"
        assert facts["serves_as"] == {"release to import with arc-ds import": None}
        assert facts["encoder"]["num_layers"] == 1 and facts["encoder"]["hidden_size"] == ENCODER.hidden_size
        assert facts["bridge"] == {"kind": "mlp", "hidden_size": 24} and facts["decoders"] == [{"hidden_size": 48}]
    assert cli.main(["inspect", str(release), "--encoder-backbone", str(backbone)]) == 0
    assert cli.main(["inspect", str(release)]) == 2, "its sizes are not those of Llama 3.2 3B"
    assert "give its folder: --encoder-backbone" in capsys.readouterr().out


def test_a_release_cut_short_is_named_as_damaged(tmp_path: Path) -> None:
    write_release(tmp_path / "release")
    file = tmp_path / "release" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    for path in (file.parent, file):
        assert "cut short or damaged" in inspect_path(path)["serves_as"]["decoder"]


def test_a_run_is_to_be_exported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny_trained(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)
    assert cli.main(["inspect", str(tmp_path / "run")]) == 2
    assert f"arc-ds export {tmp_path / 'run'} OUT" in capsys.readouterr().out


def test_a_link_to_a_deleted_file_is_a_reason(tmp_path: Path) -> None:
    """A cache of Hugging Face that was cleaned in part."""
    (hugging_face(tmp_path) / "model-00001-of-00002.safetensors").unlink()
    (tmp_path / "model-00001-of-00002.safetensors").symlink_to(tmp_path / "gone")
    (tmp_path / "model.safetensors.index.json").unlink()
    assert "No such file" in inspect_path(tmp_path)["serves_as"]["decoder"]


def test_two_tokenizers_of_an_export_are_a_reason(tmp_path: Path) -> None:
    write_export(tiny_trained(tmp_path / "run"), tmp_path / "out")
    for file in (tmp_path / "out").glob("tokenizer*"):
        file.unlink()
    for name in ("a", "b"):
        (tmp_path / "out" / f"{name}.model").write_text(name)
    assert "several candidates (a.model, b.model)" in inspect_path(tmp_path / "out")["serves_as"]["compressor"]


def test_no_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hugging_face(tmp_path)

    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("arc_ds.model.weights.stores.SafetensorsStore.tensor", refuse)
    assert None in inspect_path(folder)["serves_as"].values()

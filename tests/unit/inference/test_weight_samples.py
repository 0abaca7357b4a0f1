"""An export knows the decoder that it was trained for: copies of it pass, another model is refused unless forced."""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from arc_ds import ArcModel
from arc_ds.cli import main
from arc_ds.errors import TokenizerError, WeightsError
from arc_ds.export.formats import write_export
from arc_ds.inference.decoders import OpenedDecoder, open_decoder
from arc_ds.inference.weight_samples import check_weights, sample_weights
from arc_ds.launch.exit_codes import EXIT_USER_ERROR
from arc_ds.tokenizers import ids_digest, load_tokenizer
from tests.helpers import tiny_models as tiny
from tests.helpers.tiny_data import swap_letters
from tests.helpers.tiny_export import DECODER, tiny_trained, write_decoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports in both formats with records of their decoder, and the decoder."""
    folder = tmp_path_factory.mktemp("samples")
    decoder = write_decoder(folder / "decoder").parent / "decoder"
    samples = sample_weights(open_decoder(decoder, "checkpoint"))
    trained = dataclasses.replace(
        tiny_trained(folder / "run"),
        decoder_weights={"decoder0": samples},
        decoder_ids=(ids_digest(load_tokenizer(decoder)),),
    )
    for export_format in ("arc-ds", "arc"):
        write_export(trained, folder / export_format, export_format=export_format)
    return folder


def test_samples_are_the_values_that_earlier_exports_recorded(tmp_path: Path) -> None:
    """The middle rows of at most 16 matrices, 32 values of each. Other places would refuse every recorded decoder."""
    tensors = tiny.random_tensors(DECODER)
    decoder = tiny.write_hf(tmp_path / "decoder", DECODER, tensors)
    opened = open_decoder(decoder, "checkpoint")
    found = sample_weights(opened)
    values = torch.frombuffer(bytearray(base64.b64decode(found["samples"])), dtype=torch.float32)
    names = [name for name, tensor in tensors.items() if tensor.dim() == 2]
    assert len(names) == 16 and values.numel() == 16 * 32 and not found["gguf"]
    places = [place * (DECODER.hidden_size - 1) // 31 for place in range(32)]
    rows = {name: tensors[name][tensors[name].shape[0] // 2] for name in names}
    embedding = rows["tok_embeddings.weight"][places]
    assert any(torch.equal(sample, embedding) for sample in values.reshape(-1, 32))


def resave(decoder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Write a decoder's tensors again, changed, to two files."""
    (file,) = decoder.glob("*.safetensors")
    tensors = {name: change(tensor).contiguous() for name, tensor in load_file(file).items()}
    file.unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for part, members in parts.items():
        save_file({name: tensors[name] for name in members}, decoder / part)
    weight_map = {name: part for part, members in parts.items() for name in members}
    (decoder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("export_format", ["arc-ds", "arc"])
@pytest.mark.parametrize(
    "change", [torch.Tensor.float, torch.Tensor.bfloat16, torch.Tensor.half], ids=["split", "bfloat16", "float16"]
)
def test_copies_of_the_decoder_pass(
    folder: Path, tmp_path: Path, export_format: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    write_decoder(tmp_path / "copy")
    resave(tmp_path / "copy", change)
    ArcModel.from_checkpoint(folder / export_format, decoders=[tmp_path / "copy"])


@pytest.mark.parametrize("export_format", ["arc-ds", "arc"])
@pytest.mark.parametrize("kind", ["other seed", "fine-tuned by 1%", "other layers"])
def test_another_model_is_refused_unless_forced(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, export_format: str, kind: str
) -> None:
    other = tmp_path / "other"
    write_decoder(other, seed=2 if kind == "other seed" else 1, **({"num_layers": 1} if kind == "other layers" else {}))
    if kind == "fine-tuned by 1%":
        noise = torch.Generator().manual_seed(0)
        resave(other, lambda t: t * (1 + 0.01 * torch.randn(t.shape, generator=noise)))
    with pytest.raises(WeightsError, match=r"other is another model than .* differ by .*--force \(force=True\)"):
        ArcModel.from_checkpoint(folder / export_format, decoders=[other])
    with caplog.at_level(logging.WARNING):
        ArcModel.from_checkpoint(folder / export_format, decoders=[other], force=True)
    assert "another model" in caplog.text


def test_the_command_has_force(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_decoder(tmp_path / "other", seed=2)
    words = ["generate", "--model", str(folder / "arc-ds"), "--decoder", str(tmp_path / "other"), "A lamp"]
    assert main(words) == EXIT_USER_ERROR
    assert "--force" in capsys.readouterr().err
    assert main([*words, "--force", "--device", "cpu"]) == 0


def test_the_server_has_force(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_decoder(tmp_path / "other", seed=2)
    served: list[object] = []
    monkeypatch.setattr("arc_ds.serving.server.Server.run", lambda self, sockets: served.append(self))
    words = ["serve", "--model", str(folder / "arc-ds"), "--decoder", str(tmp_path / "other"), "--port", "0"]
    assert main(words) == EXIT_USER_ERROR
    assert "--force" in capsys.readouterr().err
    assert main([*words, "--force", "--device", "cpu"]) == 0 and len(served) == 1


def test_a_forced_model_has_its_own_tokenizer(folder: Path, tmp_path: Path) -> None:
    write_decoder(tmp_path / "other")
    swap_letters(tmp_path / "other")
    with pytest.raises(TokenizerError, match="gives other ids"):
        ArcModel.from_checkpoint(folder / "arc-ds", decoders=[tmp_path / "other"])
    ArcModel.from_checkpoint(folder / "arc-ds", decoders=[tmp_path / "other"], force=True)


def test_exports_without_the_record_take_any_decoder_of_the_width(folder: Path, tmp_path: Path) -> None:
    write_export(tiny_trained(tmp_path / "run"), tmp_path / "out")
    ArcModel.from_checkpoint(tmp_path / "out", decoders=[folder / "decoder"])


def test_samples_do_not_depend_on_the_container(tmp_path: Path) -> None:
    """Native files pair rotary rows in another way, Meta's are split, and quantised GGUF files round."""
    config = dataclasses.replace(DECODER, hidden_size=64, head_dim=16, ffn_size=192)
    tensors, others = tiny.random_tensors(config, 3), tiny.random_tensors(config, 4)

    def opened(path: Path) -> OpenedDecoder:
        return open_decoder(path, "checkpoint")

    recorded = sample_weights(opened(tiny.write_hf(tmp_path / "hf", config, tensors)))
    for path in (
        tiny.write_mistral(tmp_path / "mistral", config, tensors),
        tiny.write_llama_pickles(tmp_path / "meta", config, tensors, 2),
    ):
        assert sample_weights(opened(path)) == recorded, path
    copies = [tiny.write_gguf(tmp_path / f"{q}.gguf", config, tensors, quantise=q) for q in (None, "Q8_0", "Q4_0")]
    for path in copies:
        check_weights(opened(path), recorded, path, "export", force=False)
    for path in (
        tiny.write_gguf(tmp_path / "other.gguf", config, others, quantise="Q4_0"),
        tiny.write_mistral(tmp_path / "other", config, others),
    ):
        with pytest.raises(WeightsError, match="is another model"):
            check_weights(opened(path), recorded, path, "export", force=False)


def test_a_decoder_through_transformers_is_known_by_the_tensors_in_its_files(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.helpers.transformers_models import write_model

    folder = tmp_path / "neox"
    write_model(folder, "GPTNeoX")
    recorded = sample_weights(open_decoder(folder, "checkpoint"))
    assert len(recorded["samples"]) > 1000
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    check_weights(open_decoder(folder, "checkpoint"), recorded, folder, "export", force=False)
    save_file({name: tensor.flip(-1).contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="is another model"):
        check_weights(open_decoder(folder, "checkpoint"), recorded, folder, "export", force=False)

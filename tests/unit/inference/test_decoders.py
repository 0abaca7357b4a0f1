"""Which implementation runs a decoder, and the errors of decoders that none can run. Remedies are followed."""

from __future__ import annotations

import json
import logging
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from arc_ds import ArcModel, Context
from arc_ds.cli import main
from arc_ds.errors import WeightsError
from arc_ds.export.formats import write_export
from arc_ds.inference.decoders import NativeFiles, open_decoder, read_decoder_sizes
from arc_ds.inference.load import open_arc_folder
from arc_ds.model.transformers_decoder import check_length
from arc_ds.model.transformers_files import TransformersFiles
from tests.helpers.generation import generate_ids
from tests.helpers.tiny_data import write_json_tokenizer
from tests.helpers.tiny_export import tiny_trained, write_decoder

pytest.importorskip("transformers")
from tests.helpers.transformers_models import parameter_hash, text_batch, write_model

CPU = torch.device("cpu")
OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def neox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of a family that our transformer does not compute."""
    folder = tmp_path_factory.mktemp("neox")
    write_model(folder, "GPTNeoX")
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**plain, **changes}))


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_auto_takes_our_transformer_if_it_can_and_says_why_if_it_cannot(
    neox: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert isinstance(open_decoder(write_decoder(tmp_path / "llama"), "checkpoint"), NativeFiles)
    assert not caplog.messages
    opened = open_decoder(neox, "checkpoint")
    assert isinstance(opened, TransformersFiles) and opened.sizes.model_type == "gpt_neox"
    (message,) = caplog.messages
    assert (
        f"decoder {neox} runs through transformers: our own transformer cannot" in message
        and "`model_type` is 'gpt_neox'" in message
    )
    assert read_decoder_sizes(neox, "checkpoint") == opened.sizes and opened.sizes.max_positions is None
    assert len(caplog.messages) == 1
    with pytest.raises(WeightsError, match="`model_type` is 'gpt_neox'; ARC-DS itself computes"):
        open_decoder(neox, "checkpoint", implementation="native")
    decoder = opened.load(CPU, torch.float32)
    assert opened.num_parameters == sum(parameter.numel() for parameter in decoder.parameters())


def test_a_damaged_file_is_an_error_of_our_reader_and_not_left_to_transformers(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "llama")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="not a complete safetensors file") as caught:
        open_decoder(folder, "checkpoint")
    assert "transformers" not in str(caught.value)


def test_a_model_that_neither_knows_is_one_error_that_says_what_was_seen(neox: Path, tmp_path: Path) -> None:
    folder = copy_of(neox, tmp_path / "unknown")
    change_config(folder, model_type="novel", architectures=["NovelForCausalLM"])
    with pytest.raises(WeightsError) as caught:
        open_decoder(folder, "checkpoint")
    message = str(caught.value)
    assert "does not compute 'novel'" in message and message.count("`model_type` is 'novel'") == 1
    assert "implementation" not in message, "no remedy that does not help"
    assert "`architectures` is ['NovelForCausalLM']" in message and "pip install --upgrade transformers" in message
    change_config(folder, quantization_config={"quant_method": "fp8"})
    with pytest.raises(WeightsError, match="quantization_config") as caught:
        open_decoder(folder, "checkpoint")
    assert str(caught.value).count("quantization_config") == 1, "both implementations give the same reason"
    change_config(folder, model_type="clip_vision_model", quantization_config=None)
    with pytest.raises(WeightsError, match="has no causal language model for it"):
        open_decoder(folder, "checkpoint")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="empty holds nothing; expected") as caught:
        open_decoder(tmp_path / "empty", "checkpoint")
    assert "transformers says" not in str(caught.value)


def test_code_of_the_folder_runs_only_if_the_user_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    write_model(folder, "Llama", vocab_size=350)
    write_json_tokenizer(folder)
    ran = tmp_path / "ran"
    (folder / "own_code.py").write_text(f"open({str(ran)!r}, 'w').close()\n{OWN_CODE}")
    own = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"}
    change_config(folder, model_type="own", auto_map=own)
    with pytest.raises(
        WeightsError, match=r"own_code.py.*set decoders\[\].trust_remote_code: true in the run's config"
    ):
        open_decoder(folder, "checkpoint")
    assert not ran.exists()
    opened = open_decoder(folder, "checkpoint", trust_remote_code=True)  # the remedy
    write_export(tiny_trained(tmp_path / "run", decoder_sizes=(32,)), tmp_path / "export")
    command = ["generate", f"--model={tmp_path / 'export'}", f"--decoder={folder}", "--max-new-tokens=2", "A lamp"]
    assert main(command) == 2 and "--trust-remote-code on the command line" in capsys.readouterr().err
    assert main([*command, "--trust-remote-code"]) == 0
    assert ran.exists() and type(opened.load(CPU, torch.float32).model).__name__ == "OwnForCausalLM"  # type: ignore[attr-defined]


def test_tensors_that_do_not_fit_are_listed(neox: Path, tmp_path: Path) -> None:
    folder = copy_of(neox, tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    del tensors["gpt_neox.final_layer_norm.bias"]
    tensors["gpt_neox.layers.0.attention.extra.weight"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"final_layer_norm.bias` is missing") as caught:
        open_decoder(folder, "checkpoint").load(CPU, torch.float32)
    assert "`gpt_neox.layers.0.attention.extra.weight` has no place in the model" in str(caught.value)
    tensors = load_file(neox / "model.safetensors")
    tensors["gpt_neox.final_layer_norm.bias"] = torch.zeros(31)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"cannot load .*damaged"):
        open_decoder(folder, "checkpoint").load(CPU, torch.float32)
    (folder / "model.safetensors").write_bytes((neox / "model.safetensors").read_bytes()[:-50])
    with pytest.raises(WeightsError, match=r"cannot load .*damaged"):
        open_decoder(folder, "checkpoint").load(CPU, torch.float32)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="holds a config.json but no weights"):
        open_decoder(folder, "checkpoint")


class _Malicious:
    """Creates a file if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_are_read_but_run_no_code(neox: Path, tmp_path: Path) -> None:
    folder = copy_of(neox, tmp_path / "pickled")
    ran = tmp_path / "ran"
    pickle.loads(pickle.dumps(_Malicious(ran)))
    ran.unlink()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    opened = open_decoder(folder, "checkpoint")
    assert [file.name for file in opened.files] == ["pytorch_model.bin"]
    decoder = opened.load(CPU, torch.float32)
    assert torch.equal(decoder.get_parameter("model.lm_head.weight"), tensors["embed_out.weight"])
    torch.save({**tensors, "code": _Malicious(ran)}, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="cannot load"):
        opened.load(CPU, torch.float32)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Malicious(ran)))
    with pytest.raises(WeightsError, match="cannot load"):
        opened.load(CPU, torch.float32)
    assert not ran.exists()


def test_a_table_of_positions_bounds_the_sequences(tmp_path: Path) -> None:
    write_model(tmp_path, "OPT", max_position_embeddings=20)
    sizes = read_decoder_sizes(tmp_path, "checkpoint")
    check_length(sizes, 20)
    with pytest.raises(WeightsError, match="opt decoder computes up to 20 positions .* but a sequence takes up to 21"):
        check_length(sizes, 21)
    decoder, batch = open_decoder(tmp_path, "checkpoint").load(CPU, torch.float32), text_batch([[5] * 12])
    assert len(generate_ids(decoder, batch, None, max_new_tokens=9)[0]) == 9
    with pytest.raises(WeightsError, match=r"takes up to 21\. .* Shorten the sequences"):
        generate_ids(decoder, batch, None, max_new_tokens=10)
    with pytest.raises(WeightsError, match=r"takes up to 21\. .* Shorten the sequences"):
        decoder.logits(text_batch([[5] * 21]), None, torch.tensor([0]))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_scalings_of_the_longest_sequence_bound_the_sequences(kind: str, tmp_path: Path) -> None:
    rope, stated = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}, 20
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 20}
        stated = 80
    model = write_model(tmp_path, "Llama", max_position_embeddings=stated, rope_parameters=rope)
    decoder = open_decoder(tmp_path, "checkpoint", implementation="transformers").load(CPU, torch.float32)
    short, long = [5, 9, 30, 7], list(range(30))
    own, beside = (model(torch.tensor(ids)).logits[0, :4] for ids in ([short], [short + [0] * 26, long]))
    assert (own - beside).abs().max() > 1e-2, "transformers computes the short sequence as the long one needs"
    with pytest.raises(WeightsError, match="llama decoder computes up to 20 positions .* implementation: native"):
        decoder.logits(text_batch([short, long]), None, torch.tensor([3]))
    torch.testing.assert_close(decoder.logits(text_batch([short, long[:20]]), None, torch.arange(4)), own)
    assert isinstance(open_decoder(tmp_path, "checkpoint", implementation="native"), NativeFiles)  # the remedy


def test_weights_of_another_task_are_named(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPTNeoXConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    transformers.GPTNeoXForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="`lm_head.weight` is missing") as caught:
        open_decoder(tmp_path, "checkpoint").load(CPU, torch.float32)
    assert "holds a GPTNeoXForSequenceClassification, but a decoder is a GPTNeoXForCausalLM" in str(caught.value)


def test_a_model_that_cannot_run_is_one_error(neox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GPTNeoXForCausalLM

    def fail(self: Any, input_ids: Any = None, use_cache: Any = None, **_: Any) -> None:
        raise RuntimeError("sizes do not match")

    monkeypatch.setattr(GPTNeoXForCausalLM, "forward", fail)
    with pytest.raises(WeightsError, match=r"cannot run .* on short texts: .*sizes do not match"):
        open_decoder(neox, "checkpoint").load(CPU, torch.float32)


def test_a_loaded_decoder_does_not_change_with_its_file(neox: Path, tmp_path: Path) -> None:
    folder = copy_of(neox, tmp_path / "copied")
    decoder = open_decoder(folder, "checkpoint").load(CPU, torch.float32)
    before = parameter_hash(decoder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-4000, 2)
        file.write(b"\x01" * 4000)
    assert parameter_hash(decoder) == before
    assert parameter_hash(open_decoder(folder, "checkpoint").load(CPU, torch.float32)) != before


def test_settings_that_transformers_cannot_honour_are_refused(neox: Path, tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match="does not compute 'gpt_neox'. decoder .*Set rope_scaling: checkpoint, or choose"
    ) as caught:
        open_decoder(neox, "none")
    assert "ARC-DS itself computes" not in str(caught.value), "no remedy leads to the native reader's error"
    folder = copy_of(neox, tmp_path / "quantised")
    change_config(folder, quantization_config={"quant_method": "fp8"})
    with pytest.raises(WeightsError, match=r"`quantization_config` says .*\(fp8\).*in bfloat16, or a .gguf") as caught:
        open_decoder(folder, "checkpoint", implementation="transformers")
    for rope_scaling in ("checkpoint", "none"):
        with pytest.raises(WeightsError) as of_auto:
            open_decoder(folder, rope_scaling)
        assert str(of_auto.value) == str(caught.value)
    folder = copy_of(neox, tmp_path / "adapter")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(WeightsError, match="holds an adapter"):
        open_decoder(folder, "checkpoint", implementation="transformers")


def test_without_the_package_the_error_names_it_and_our_reader_s_reason(
    neox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(WeightsError, match=r"'gpt_neox'.*pip install \"arc-ds\[transformers\]\""):
        open_decoder(neox, "checkpoint")


def test_an_export_finds_the_implementation_of_its_training(tmp_path: Path) -> None:
    write_model(tmp_path / "neox", "GPTNeoX", hidden_size=48, vocab_size=350)
    write_json_tokenizer(tmp_path / "neox")
    llama = write_decoder(tmp_path / "llama")
    trained = tiny_trained(tmp_path / "run")
    write_export(trained, tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["decoders"][0]["implementation"] == "native"
    prompt = ["The wind ", Context("came from the sea."), " It"]
    losses = {}
    for implementation in ("native", "transformers", None):
        config["decoders"][0].pop("implementation", None)
        config["decoders"][0] |= {} if implementation is None else {"implementation": implementation}
        (tmp_path / "export" / "config.json").write_text(json.dumps(config))
        assert open_arc_folder(tmp_path / "export").decoders[0].implementation == (implementation or "auto")
        model = ArcModel.from_checkpoint(tmp_path / "export", decoders=[llama])
        assert model.decoders[0].implementation == (implementation or "native")
        losses[implementation] = model.generate([prompt, prompt[:2]], max_new_tokens=12)
    assert losses["native"] == losses["transformers"] == losses[None]
    model = ArcModel.from_checkpoint(tmp_path / "export", decoders=[tmp_path / "neox"])
    assert model.decoders[0].implementation == "transformers"
    ours = model.generate([prompt, "A lamp"], max_new_tokens=12)
    assert ours == [model.generate([each], max_new_tokens=12)[0] for each in (prompt, "A lamp")] and all(ours)
    config["decoders"][0]["implementation"] = "other"
    (tmp_path / "export" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="if any, an implementation .auto or native or transformers."):
        open_arc_folder(tmp_path / "export")

"""Starting weights of a run's compressor: its backbone, or the weights of another run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from arc_ds.checkpoints.trained_for import TrainedFor
from arc_ds.config.load import load_config
from arc_ds.config.schema import RunConfig
from arc_ds.errors import ConfigError, TokenizerError, WeightsError
from arc_ds.export.consolidate import TrainedCompressor
from arc_ds.export.formats import write_export
from arc_ds.inference.decoders import open_decoder
from arc_ds.inference.weight_samples import sample_weights
from arc_ds.model.compressor import Compressor
from arc_ds.model.spec import CompressorSpec
from arc_ds.tokenizers import ids_digest, load_tokenizer
from arc_ds.training.build_model import (
    DecoderFiles,
    compressor_spec,
    open_decoders,
    open_starting_weights,
    starting_compressor,
    tokenizer_path,
)
from arc_ds.training.ports import PortRecord, saved_ports, warn_of_ports
from tests.helpers.tiny_data import swap_letters, write_json_tokenizer
from tests.helpers.tiny_export import random_trained
from tests.helpers.tiny_models import random_tensors, tiny_config, write_hf, write_mistral
from tests.helpers.tiny_run import write_inputs
from tests.helpers.tokenizer_files import write_mistral_tokenizer
from tests.helpers.written import write_chat_tokenizer


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def trained(config_file: Path) -> TrainedCompressor:
    """An export for the first decoder only, next to the config."""
    both = compressor_spec(load_config(config_file))
    spec = dataclasses.replace(both, decoder_sizes=both.decoder_sizes[:1])
    decoders = [TrainedFor(name="wide", rope_scaling="checkpoint")]
    ids = (ids_digest(load_tokenizer(config_file.parent / "wide")),)
    result = random_trained(spec, config_file.parent / "encoder", decoders, decoder_ids=ids)
    write_export(result, config_file.parent / "export")
    return result


def test_weights_of_another_run_are_taken_and_new_decoders_get_fresh_ports(
    config_file: Path, trained: TrainedCompressor
) -> None:
    config = _from_export(config_file, "pooling.factors=[2]")  # fine-tuning to a lower factor is allowed
    found = dict(_start(config).named_parameters())
    for name, value in trained.tensors.items():
        assert torch.equal(found[name], value), name
    fresh = {name for name in found if name not in trained.tensors}
    assert fresh and all(name.startswith("ports.1.") for name in fresh)
    assert torch.equal(found["ports.1.cont"], torch.ones_like(found["ports.1.cont"]))
    assert found["ports.1.bridge.layer1.weight"].std() > 1e-2


def test_a_decoder_in_the_place_of_another_starts_with_a_bridge_of_its_own(
    config_file: Path, trained: TrainedCompressor
) -> None:
    found = dict(_start(_from_export(config_file, "decoders.0.fresh_bridge=true")).named_parameters())
    for name, value in trained.tensors.items():
        assert torch.equal(found[name], value) != name.startswith("ports.0."), name
    assert any(name.startswith("ports.0.") for name in trained.tensors)


def test_the_backbone_is_the_start_where_no_weights_are_named(config_file: Path, trained: TrainedCompressor) -> None:
    config = load_config(config_file)
    found = dict(_start(config).named_parameters())
    name = "encoder.layers.0.attention.wq.weight"
    assert not torch.equal(found[name], trained.tensors[name])


def test_markers_may_start_as_the_embedding_of_a_line_break(config_file: Path) -> None:
    found = dict(_start(load_config(config_file, ["markers.init=embedding"])).named_parameters())
    idx = load_tokenizer(config_file.parent / "encoder").encode("\n")[-1]
    assert torch.equal(found["ports.1.rec"], found["encoder.tok_embeddings.weight"][idx : idx + 1])


@pytest.mark.parametrize(
    ("override", "named"),
    [("encoder.causal=true", "encoder.causal"), ("pooling.strategy=sum", "pooling.strategy"),
     ("pooling.where=between", "pooling.where"), ("pooling.factors=[2, 2]", "layers that pool"),
     ("data.decoder_bos=false", "data.decoder_bos"), ("bridge.kind=linear", "bridge.kind: linear here, mlp there"),
     ("bridge.kind=rms", "bridge.kind: rms here, mlp there"),
     ("decoders.0.lora={rank: 2, alpha: 8}", "lora of decoder .*: rank 2 and alpha 8 here, none there")],
)  # fmt: skip
def test_weights_of_another_meaning_are_refused(
    config_file: Path, trained: TrainedCompressor, override: str, named: str
) -> None:
    config = _from_export(config_file, override)
    with pytest.raises(ConfigError, match=f"init_from.*{named}"):
        _start(config)


def test_a_decoder_with_another_rotary_scaling_than_in_training_is_refused(
    config_file: Path, tmp_path: Path, trained: TrainedCompressor
) -> None:
    folder = shutil.copytree(config_file.parent / "wide", tmp_path / "wide")
    plain = json.loads((folder / "config.json").read_text())
    plain["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(plain))
    named = f"decoders=[{{name: wide, backbone: {folder}, rope_scaling: %s}}]"
    _start(_from_export(config_file, named % "checkpoint"))
    with pytest.raises(ConfigError, match="rope_scaling of decoder wide: None here, RopeScaling"):
        _start(_from_export(config_file, named % "none"))


def test_starting_weights_serve_both_implementations(config_file: Path, trained: TrainedCompressor) -> None:
    pytest.importorskip("transformers")
    found = _start(_from_export(config_file, "decoders.0.implementation=transformers"))
    assert torch.equal(found.get_parameter("ports.0.cont"), trained.tensors["ports.0.cont"])


def test_a_bridge_of_another_kind_is_fine_where_all_start_fresh(config_file: Path, trained: TrainedCompressor) -> None:
    config = _from_export(config_file, "bridge.kind=linear", "decoders.0.fresh_bridge=true")
    assert not [name for name, _ in _start(config).named_parameters() if name.endswith("layer2.weight")]


def test_an_equal_width_bridge_never_loses_its_second_layer_silently(config_file: Path, tmp_path: Path) -> None:
    """With equal widths, layer1 alone fits a linear bridge."""
    spec = dataclasses.replace(compressor_spec(load_config(config_file)), decoder_sizes=(32,), bridge_hidden_size=32)
    folder = _export(config_file, tmp_path, spec, ("other",))
    overrides = [f"encoder.init_from={folder}", "bridge.hidden_size=32", _decoders(config_file, "other")]
    _start(load_config(config_file, overrides))
    with pytest.raises(ConfigError, match="bridge.kind: linear here, mlp there"):
        _start(load_config(config_file, [*overrides, "bridge.kind=linear"]))


@pytest.mark.parametrize("name", ["ports.5.cont", "ports.0.bridge.layer3.weight", "ports.0.note", "encoder.extra"])
def test_a_tensor_that_the_export_does_not_describe_is_named(
    config_file: Path, tmp_path: Path, trained: TrainedCompressor, name: str
) -> None:
    folder = shutil.copytree(config_file.parent / "export", tmp_path / "export")
    (folder / "checksums.json").unlink()  # as in an earlier export
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: torch.ones(1, 32)}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=f"`{name}` has no place"):
        _start(load_config(config_file, [f"encoder.init_from={folder}"]))
    save_file(tensors, folder / "model.safetensors")  # the remedy
    _start(load_config(config_file, [f"encoder.init_from={folder}"]))


def test_markers_that_the_export_lacks_are_named(config_file: Path, tmp_path: Path) -> None:
    spec = dataclasses.replace(compressor_spec(load_config(config_file)), markers=("cont",))
    folder = _export(config_file, tmp_path, spec, ("wide", "other"))
    with pytest.raises(ConfigError, match="markers: cont, rec here, cont there"):
        _start(load_config(config_file, [f"encoder.init_from={folder}"]))
    _start(load_config(config_file, [f"encoder.init_from={folder}", "markers.rec=false"]))


def test_kept_ports_must_have_the_form_of_the_trained_ones(config_file: Path, tmp_path: Path) -> None:
    """An export describes the form of all its ports once."""
    folder = _export(config_file, tmp_path, compressor_spec(load_config(config_file)), ("wide", "other"))
    new = f"decoders=[{{name: new, backbone: {config_file.parent / 'wide'}, fresh_bridge: true}}]"
    overrides = [f"encoder.init_from={folder}", new]
    for change, named in (
        ("bridge.kind=rms", "bridge.kind: rms here, mlp there"),
        ("bridge.hidden_size=12", "bridge.hidden_size: 12 here, 24 there"),
        ("markers.rec=false", "markers: cont here, cont, rec there"),
    ):
        with pytest.raises(ConfigError, match=f"{named}.*encoder.keep_ports=false"):
            _start(load_config(config_file, [*overrides, change]))
        _start(load_config(config_file, [*overrides, change, "encoder.keep_ports=false"]))  # the remedy
    _start(load_config(config_file, overrides))


def test_stale_and_renamed_ports_are_warned_of(
    config_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wide = config_file.parent / "wide"
    other = shutil.copytree(wide, tmp_path / "other")
    (file,) = other.glob("*.safetensors")
    save_file({name: 1.5 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    ours = {"wide": _samples(wide)}
    folder = _export(config_file, tmp_path, compressor_spec(load_config(config_file)), ("wide", "other"), ours)

    def warnings(name: str, *changes: str, backbone: Path = wide, trains_encoder: bool = False) -> str:
        new = f"decoders=[{{name: {name}, backbone: {backbone}}}]"
        config = load_config(config_file, [f"encoder.init_from={folder}", new, *changes])
        weights = open_starting_weights(config, compressor_spec(config))
        decoder = TrainedFor(name=name, rope_scaling="checkpoint")
        records = [PortRecord(decoder=decoder, ids_digest=None, weights=_samples(backbone))]
        caplog.clear()
        warn_of_ports(config, records, weights.plan, weights.folder, trains_encoder=trains_encoder)
        return caplog.text

    assert not warnings("wide")
    assert "keeps the bridges and markers of other unchanged" in warnings("wide", trains_encoder=True)
    renamed = warnings("renamed")
    assert "decoder renamed continues the bridge and markers of wide, which are at its place" in renamed
    assert "set decoders.0.fresh_bridge=true" in renamed
    changed = warnings("wide", backbone=other)
    assert "of wide, which were trained for another model: samples of its weights differ by 50.0%" in changed
    assert "set decoders.0.fresh_bridge=true" in changed
    assert not warnings("wide", "decoders.0.fresh_bridge=true", backbone=other)


def test_kept_ports_keep_their_records(config_file: Path, tmp_path: Path) -> None:
    folder = _export(config_file, tmp_path, compressor_spec(load_config(config_file)), ("wide", "other"))
    new = f"decoders=[{{name: new, backbone: {config_file.parent / 'wide'}, fresh_bridge: true}}]"
    config = load_config(config_file, [f"encoder.init_from={folder}", new])
    spec = compressor_spec(config)
    opened = open_starting_weights(config, spec)
    assert opened.folder is not None
    settings = {"rope_scaling": "none", "bos": False, "ids_digest": "a", "weights": {"samples": "", "gguf": True}}
    theirs = [
        dataclasses.replace(decoder, implementation=implementation, **settings)
        for decoder, implementation in zip(opened.folder.decoders, ("transformers", "auto"), strict=True)
    ]
    record = PortRecord(decoder=TrainedFor(name="new", rope_scaling="none"), ids_digest=None, weights=None)
    found = saved_ports([record], spec, opened.plan, dataclasses.replace(opened.folder, decoders=tuple(theirs)))
    assert found.records[2] == record and found.spec.decoder_sizes == (48, 32, 48)
    for kept, name, implementation in zip(found.records, ("wide", "other"), ("transformers", "native"), strict=False):
        expected = TrainedFor(name=name, rope_scaling="none", implementation=implementation, bos=False)
        assert kept == PortRecord(decoder=expected, ids_digest="a", weights=settings["weights"])


def test_adapters_of_a_decoder_are_continued_and_kept(config_file: Path, tmp_path: Path) -> None:
    lora = "decoders.1.lora={rank: 3, alpha: 8}"
    fresh = load_config(config_file, [lora])
    start, plain = dict(_start(fresh).named_parameters()), dict(_start(load_config(config_file)).named_parameters())
    assert all(torch.equal(start[name], value) for name, value in plain.items())
    added = start.keys() - plain.keys()
    assert len(added) == 2 * 7 and all(start[name].any() != name.endswith("_b") for name in added)
    folder = _export(config_file, tmp_path, compressor_spec(fresh), ("wide", "other"))
    saved, init = load_file(folder / "model.safetensors"), f"encoder.init_from={folder}"
    found = dict(_start(load_config(config_file, [lora, init])).named_parameters())
    config = load_config(config_file, [_decoders(config_file, "wide"), init])
    spec = compressor_spec(config)
    opened = open_starting_weights(config, spec)
    record = PortRecord(decoder=TrainedFor(name="wide", rope_scaling="none"), ids_digest=None, weights=None)
    ports = saved_ports([record], spec, opened.plan, opened.folder)
    assert ports.spec.adapters == compressor_spec(fresh).adapters and spec.adapters == ()
    for name in added:
        assert torch.equal(found[name], saved[name]) and torch.equal(ports.kept[name], saved[name]), name


def test_the_first_memory_tokens_are_a_start(config_file: Path, tmp_path: Path) -> None:
    memory = ["pooling.factors=[]", "pooling.memory_tokens=8"]
    spec = compressor_spec(load_config(config_file, memory))
    folder = _export(config_file, tmp_path, spec, ("wide", "other"))
    overrides = [f"encoder.init_from={folder}", "pooling.factors=[]"]
    found = _start(load_config(config_file, [*overrides, "pooling.memory_tokens=3"])).encoder.memory
    assert torch.equal(found, load_file(folder / "model.safetensors")["encoder.memory"][:3])
    with pytest.raises(ConfigError, match="pooling.memory_tokens: 9 here, 8 there"):
        _start(load_config(config_file, [*overrides, "pooling.memory_tokens=9"]))


def test_a_shared_bridge_is_copied_to_each_port_and_one_bridge_may_become_shared(
    config_file: Path, tmp_path: Path
) -> None:
    shared = ["bridge.shared=true", _decoders(config_file, "other", "encoder")]
    spec = compressor_spec(load_config(config_file, shared))
    folder = _export(config_file, tmp_path, spec, ("other", "encoder"))
    old, init_from = load_file(folder / "model.safetensors"), f"encoder.init_from={folder}"
    same = _start(load_config(config_file, [init_from, *shared])).bridge
    assert torch.equal(same.layer2.weight, old["bridge.layer2.weight"])
    apart = dict(_start(load_config(config_file, [init_from, shared[1]])).named_parameters())
    for n in range(2):
        assert torch.equal(apart[f"ports.{n}.bridge.layer2.weight"], old["bridge.layer2.weight"])
        assert torch.equal(apart[f"ports.{n}.rec"], old[f"ports.{n}.rec"])
    one = [init_from, "bridge.shared=true", _decoders(config_file, "other")]
    with pytest.raises(ConfigError, match=r"bridge.shared is true.*ports of encoder cannot be kept"):
        _start(load_config(config_file, one))
    for remedy in ("bridge.shared=false", "encoder.keep_ports=false"):
        _start(load_config(config_file, [*one, remedy]))
    two = _export(config_file, tmp_path / "two", dataclasses.replace(spec, bridge_shared=False), ("other", "encoder"))
    with pytest.raises(ConfigError, match="a bridge for each of other, encoder.*fresh_bridge for all of them except"):
        _start(load_config(config_file, [f"encoder.init_from={two}", *shared]))
    found = _start(load_config(config_file, [f"encoder.init_from={two}", *shared, "decoders.1.fresh_bridge=true"]))
    old = load_file(two / "model.safetensors")
    assert torch.equal(found.bridge.layer1.weight, old["ports.0.bridge.layer1.weight"])
    fresh = _start(load_config(config_file, shared)).bridge.layer1.weight
    assert fresh.std() > 1e-2 and not torch.equal(fresh, found.bridge.layer1.weight)


def test_a_shared_bridge_needs_decoders_of_one_width(config_file: Path) -> None:
    with pytest.raises(ConfigError, match="decoders of one width, but theirs are 48, 32"):
        _start(load_config(config_file, ["bridge.shared=true"]))


def test_starting_weights_of_another_tokenizer_are_refused(
    config_file: Path, tmp_path: Path, trained: TrainedCompressor
) -> None:
    for key, name, message in (
        ("encoder", "encoder", "encoder/tokenizer.json is not the one .* encoder.tokenizer=.*/export"),
        ("decoders.0", "wide", "wide/tokenizer.json gives other ids.*set decoders.0.fresh_bridge=true"),
    ):
        other = swap_letters(shutil.copytree(config_file.parent / name, tmp_path / name))
        with pytest.raises(TokenizerError, match=message):
            _start(_from_export(config_file, f"{key}.tokenizer={other}"))
        if key == "decoders.0":
            _start(_from_export(config_file, f"{key}.tokenizer={other}", f"{key}.fresh_bridge=true"))
    _start(_from_export(config_file, f"encoder.tokenizer={config_file.parent / 'export'}"))  # the remedy


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.model.v3"])
def test_the_tokenizers_of_a_run_are_found_by_every_name(config_file: Path, tmp_path: Path, name: str) -> None:
    shape = tiny_config(family="mistral", vocab_size=400)
    folder = write_mistral(tmp_path / "nemo", shape, random_tensors(shape))
    write_mistral_tokenizer(folder / name)
    config = load_config(config_file, [f"encoder.backbone={folder}", f"decoders=[{{name: nemo, backbone: {folder}}}]"])
    fingerprint = load_tokenizer(folder).fingerprint
    assert tokenizer_path(config.encoder) == folder / name
    (decoder,) = _open(config)
    assert decoder.fingerprints == {"decoders.0": fingerprint}
    assert decoder.reader.tokenizer == folder / name


def test_a_special_token_beyond_the_embedding_is_refused_if_the_layout_or_bos_needs_it(
    config_file: Path, tmp_path: Path
) -> None:
    shape = tiny_config(vocab_size=340)  # one row for each token but those of the chat
    template = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
    folder = write_chat_tokenizer(write_hf(tmp_path / "chat", shape, random_tensors(shape)), template=template)

    def check(chat_template: str) -> None:
        named = f"decoders=[{{name: chat, backbone: {folder}, chat_template: {chat_template}}}]"
        _open(load_config(config_file, [named]))

    check("none")
    check("llama2")
    for layout, token in (("chatml", "im_end"), ("tokenizer", "im_start")):
        with pytest.raises(
            TokenizerError, match=rf"chat: in its tokenizer, the special token <\|{token}\|> has the id"
        ):
            check(layout)


def test_a_bridge_that_cannot_start_as_the_identity_is_refused_before_anything_is_read(config_file: Path) -> None:
    config = load_config(config_file, ["bridge.init=identity"])
    with pytest.raises(ConfigError, match="equal widths"):
        open_starting_weights(config, compressor_spec(config))


def test_a_sentence_encoder_without_a_head_is_a_start(config_file: Path, tmp_path: Path) -> None:
    shape = tiny_config(family="mistral", vocab_size=352)
    tensors = random_tensors(shape, seed=3)
    head, folder = tensors.pop("output.weight"), write_hf(tmp_path, shape, tensors)
    write_json_tokenizer(folder)
    name = "layers.0.attention.wq.weight"
    found = _start(load_config(config_file, [f"encoder.backbone={folder}"]))
    assert torch.equal(found.get_parameter(f"encoder.{name}"), tensors[name])
    config = load_config(config_file, [f"decoders=[{{name: headless, backbone: {folder}}}]"])
    with pytest.raises(WeightsError, match="weights of an encoder"):
        _open(config)
    write_hf(folder, shape, {**tensors, "output.weight": head})  # the remedy
    _open(config)


def test_a_decoder_with_a_window_shorter_than_the_sequences_is_opened(config_file: Path, tmp_path: Path) -> None:
    shape = tiny_config(family="mistral", vocab_size=352)
    folder = write_hf(tmp_path / "windowed", shape, random_tensors(shape), sliding_window=5)
    write_json_tokenizer(folder)
    named = f"decoders=[{{name: windowed, backbone: {folder}, chat_template: llama2}}]"
    (opened,) = _open(load_config(config_file, [named]))
    decoder = opened.weights.load(torch.device("cpu"), torch.float32)
    assert [layer.attention.window for layer in decoder.layers] == [5, 5]


def _start(config: RunConfig) -> Compressor:
    spec = compressor_spec(config)
    return starting_compressor(config, spec, open_starting_weights(config, spec))


def _open(config: RunConfig) -> tuple[DecoderFiles, ...]:
    return open_decoders(config.trained_decoders, bos=config.data.decoder_bos)


def _from_export(config_file: Path, *overrides: str) -> RunConfig:
    return load_config(config_file, [f"encoder.init_from={config_file.parent / 'export'}", *overrides])


def _decoders(config_file: Path, *names: str) -> str:
    return "decoders=[" + ", ".join(f"{{name: {n}, backbone: {config_file.parent / n}}}" for n in names) + "]"


def _samples(backbone: Path) -> dict[str, Any]:
    return sample_weights(open_decoder(backbone, "checkpoint"))


def _export(
    config_file: Path,
    folder: Path,
    spec: CompressorSpec,
    names: tuple[str, ...],
    weights: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write an export of a compressor with random weights for some decoders."""
    decoders = [TrainedFor(name=name, rope_scaling="checkpoint") for name in names]
    trained = random_trained(spec, config_file.parent / "encoder", decoders, decoder_weights=weights or {})
    write_export(trained, folder / "out")
    return folder / "out"

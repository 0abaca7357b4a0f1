"""Starting weights of a run's compressor: its backbone, or the weights of another run."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from arc_ds.checkpoints.trained_for import TrainedFor
from arc_ds.config.load import load_config
from arc_ds.config.schema import RunConfig
from arc_ds.errors import ConfigError, TokenizerError, WeightsError
from arc_ds.export.consolidate import TrainedCompressor
from arc_ds.export.formats import write_export
from arc_ds.model.compressor import Compressor
from arc_ds.model.spec import CompressorSpec, build_compressor
from arc_ds.tokenizers import ids_digest, load_tokenizer
from arc_ds.training.build_model import (
    DecoderFiles,
    compressor_spec,
    encoder_tokenizer_path,
    open_decoders,
    open_starting_weights,
    starting_compressor,
)
from tests.helpers.tiny_data import swap_letters, write_json_tokenizer
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
    result = TrainedCompressor(
        spec=spec,
        tensors=_random_tensors(spec),
        step=3,
        encoder_tokenizer=str(config_file.parent / "encoder"),
        decoders=(TrainedFor(name="wide", rope_scaling="checkpoint"),),
        decoder_ids=(ids_digest(load_tokenizer(config_file.parent / "wide")),),
    )
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
     ("data.decoder_bos=false", "data.decoder_bos")],
)  # fmt: skip
def test_weights_of_another_meaning_are_refused(
    config_file: Path, trained: TrainedCompressor, override: str, named: str
) -> None:
    config = _from_export(config_file, override)
    with pytest.raises(ConfigError, match=f"init_from.*{named}"):
        _start(config)


def test_starting_weights_serve_both_implementations(config_file: Path, trained: TrainedCompressor) -> None:
    pytest.importorskip("transformers")
    found = _start(_from_export(config_file, "decoders.0.implementation=transformers"))
    assert torch.equal(found.get_parameter("ports.0.cont"), trained.tensors["ports.0.cont"])


def test_starting_weights_of_another_tokenizer_are_refused(
    config_file: Path, tmp_path: Path, trained: TrainedCompressor
) -> None:
    for key, name, message in (
        ("encoder", "encoder", "encoder/tokenizer.json is not the one .* encoder.tokenizer=.*/export"),
        ("decoders.0", "wide", "wide/tokenizer.json gives other ids"),
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
    assert encoder_tokenizer_path(config.encoder) == folder / name
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
    return open_decoders(config.decoders, bos=config.data.decoder_bos)


def _from_export(config_file: Path, *overrides: str) -> RunConfig:
    return load_config(config_file, [f"encoder.init_from={config_file.parent / 'export'}", *overrides])


def _random_tensors(spec: CompressorSpec) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {
        name: torch.randn(param.shape, generator=generator) for name, param in build_compressor(spec).named_parameters()
    }

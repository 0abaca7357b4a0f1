"""Configs of evaluations: every mistake is an error with file, line and the nearest key."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from arc_ds.errors import ConfigError
from arc_ds.evaluation.config import load_eval_config
from arc_ds.evaluation.protocol import CLEAN, REFERENCE
from arc_ds.evaluation.systems.decoder_system import DecoderSection
from arc_ds.evaluation.systems.kind import SystemSettings
from arc_ds.model.backbone_config import RopeScaling
from tests.helpers import fake_eval
from tests.helpers import tiny_models as tiny
from tests.helpers.tiny_data import write_json_tokenizer

SETTINGS = SystemSettings(name="x", protocol=CLEAN, seed=0, device=torch.device("cpu"), dtype=torch.float32)
RECIPES = Path(__file__).resolve().parents[3] / "ds_configs" / "eval"
YAML = """output: out
tasks:
  - {name: squad, path: dev.json, max_samples: 100}
systems:
  - kind: echo
    window: 100
"""


def _load(tmp_path: Path, *overrides: str, text: str = YAML) -> object:
    path = tmp_path / "eval.yaml"
    path.write_text(text)
    return load_eval_config(path, overrides)


def test_systems_decode_by_their_kind_and_take_overrides(tmp_path: Path) -> None:
    config = _load(tmp_path, "systems.0.window=7", "systems.1={kind: echo, name: other}")
    assert [each.name for each in config.systems] == ["echo", "other"]
    assert config.systems[0].section == fake_eval.EchoSection(window=7)
    assert config.protocol.protocol == CLEAN


def test_a_protocol_is_a_preset_or_fields_over_one(tmp_path: Path) -> None:
    assert _load(tmp_path, "protocol=reference").protocol.protocol == REFERENCE
    mixed = _load(tmp_path, "protocol={name: reference, truncation: head}").protocol.protocol
    assert (mixed.truncation, mixed.examples, mixed.name) == ("head", "reference", "reference, changed")
    assert _load(tmp_path, "protocol={bleu_lowercase: false}").protocol.protocol == CLEAN


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("systems.0.windo=7", r"unknown key systems\.0\.windo\. Did you mean window\?"),
        ("systems.0.kind=ecco", r"systems\.0\.kind is 'ecco'\. Did you mean echo\?"),
        ("systems.0.window=0", r"systems\.0\.window is 0; expected 1 or more"),
        ("tasks.0.name=squat", r"tasks\.0\.name: .*squad"),
        ("protocol=referense", r"protocol is 'referense'; expected clean or reference"),
        ("protocol={name: clean, trunkation: head}", r"unknown key protocol\.trunkation\. Did you mean truncation\?"),
        ("max_batch_row=5", r"unknown key max_batch_row\. Did you mean max_batch_rows\?"),
        ("systems.1={kind: echo}", r"systems\.1\.name is 'echo', like that of systems\.0"),
        ("tasks=[]", "tasks is an empty list"),
        ("systems=[]", "systems is empty"),
    ],
)
def test_mistakes_name_the_key_and_the_remedy(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _load(tmp_path, override)


def test_errors_name_the_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval\.yaml:6: unknown key systems\.0\.windo"):
        _load(tmp_path, text=YAML.replace("window", "windo"))


def test_shipped_recipes_load(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MODELS", "EVAL_DATA", "ICAE", "XRAG", "PISCO"):
        monkeypatch.setenv(name, f"/{name}")
    configs = {path.stem: load_eval_config(path) for path in RECIPES.glob("*.yaml")}
    for name in ("demo", "paper_table1", "long_context"):
        assert {"arc", "closed", "open"} <= {each.kind for each in configs[name].systems}
    for name in ("paper_table1", "long_context"):
        arc, baselines = configs[name], configs[f"{name}_baselines"]
        assert arc.tasks == baselines.tasks and arc.protocol == baselines.protocol
    assert arc.systems[0].section.chunk_tokens == 1024


def test_a_decoder_with_a_long_window_is_read_from_its_config(tmp_path: Path) -> None:
    """The keys of Llama-2-7B-32K's config.json: linear rotary scaling as older versions of transformers write it."""
    sizes = tiny.tiny_config(vocab_size=340)
    scaling = {"factor": 8.0, "type": "linear"}
    tiny.write_hf(tmp_path, sizes, tiny.random_tensors(sizes), rope_scaling=scaling, max_position_embeddings=32768)
    write_json_tokenizer(tmp_path)
    reader = DecoderSection(decoder=str(tmp_path)).open(SETTINGS)
    assert reader.max_positions == 32768
    assert reader.decoder.sizes == dataclasses.replace(sizes, rope_scaling=RopeScaling(kind="linear", factor=8.0))
    plain = DecoderSection(decoder=str(tmp_path), rope_scaling="none").open(SETTINGS)
    assert plain.decoder.sizes == sizes
    (scaled,), (ignored,) = (each.nll(["a b c d"], [" e f"]) for each in (reader, plain))
    assert abs(scaled.nats - ignored.nats) > 1e-3

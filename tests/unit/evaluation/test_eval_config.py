"""Configs of evaluations: every mistake is an error with file, line and the nearest key."""

from __future__ import annotations

from pathlib import Path

import pytest

from arc_ds.errors import ConfigError
from arc_ds.evaluation.config import as_tree, load_eval_config
from arc_ds.evaluation.protocol import CLEAN, REFERENCE
from tests.helpers import fake_eval

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


def test_the_record_leaves_out_what_changes_no_prediction(tmp_path: Path) -> None:
    config = _load(tmp_path)
    assert as_tree(config) == as_tree(_load(tmp_path, "output=elsewhere", "wait_s=5", "device=cpu"))
    assert as_tree(config) != as_tree(_load(tmp_path, "max_batch_rows=5"))

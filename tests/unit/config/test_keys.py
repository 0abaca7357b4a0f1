"""`arc-ds train --keys`: every key with its type, range, default and documentation."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

import pytest

from arc_ds.cli import main
from arc_ds.config import schema
from arc_ds.config.keys import _docs, all_keys
from arc_ds.config.load import flatten, load_config
from arc_ds.config.schema import RunConfig
from tests.unit.config.test_config_load import MINIMAL


def test_every_key_of_a_config_is_listed_and_documented(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    given = {".".join("*" if part.isdigit() else part for part in key.split(".")) for key in flatten(load_config(path))}
    listed = {key.path for key in all_keys()}
    assert given <= listed and len(listed) > 60
    classes = [each for each in vars(schema).values() if is_dataclass(each) and each.__module__ == schema.__name__]
    undocumented = {(cls.__name__, field.name) for cls in classes for field in fields(cls)} - _docs().keys()
    assert RunConfig in classes and not undocumented and all(len(doc) > 5 for doc in _docs().values())


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("optimizer.betas", "number, 0 or more and less than 1] ([0.9, 0.95])"),
        ("data.batch_size", "data.batch_size: whole number, 1 or more (128)"),
        ("decoders.*.chat_template", "none | llama2 | chatml | tokenizer (none)"),
        ("*keep_every", "whole number, 1 or more or null (null)"),
        ("run_dir", "run_dir: path (required)"),
    ],
)
def test_a_pattern_selects(pattern: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--keys", pattern]) == 0
    assert words in capsys.readouterr().out


def test_a_pattern_without_a_match_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--keys", "no_such"]) == 1
    assert "no key matches no_such" in capsys.readouterr().err

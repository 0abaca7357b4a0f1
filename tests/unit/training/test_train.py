"""Checks of a rank before it opens any file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from arc_ds.config.load import load_config
from arc_ds.errors import ConfigError
from arc_ds.train import check_attention

DEMO = Path(__file__).parents[3] / "ds_configs" / "recipes" / "demo.yaml"


def test_tritons_attention_on_the_cpu_is_refused_unless_it_is_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS", "models")
    monkeypatch.setenv("SHARDS", "shards")
    config = load_config(DEMO)
    demanded = dataclasses.replace(config, attention_backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check_attention(demanded, torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    check_attention(config, torch.device("cpu"))
    check_attention(demanded, torch.device("cuda"))
    with pytest.raises(ConfigError, match="attention_backend=auto"):
        check_attention(demanded, torch.device("cpu"))

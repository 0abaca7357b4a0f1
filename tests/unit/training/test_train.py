"""Checks of a rank before it opens any file."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from arc_ds import train
from arc_ds.config.load import load_config
from arc_ds.errors import ConfigError
from arc_ds.train import check_attention
from arc_ds.training.collectives import CollectiveCounter
from arc_ds.training.hooks import MetricsHook

DEMO = Path(__file__).parents[3] / "ds_configs" / "recipes" / "demo.yaml"


def test_tritons_attention_on_the_cpu_is_refused_unless_it_is_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check_attention("triton", torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    check_attention("auto", torch.device("cpu"))
    check_attention("triton", torch.device("cuda"))
    with pytest.raises(ConfigError, match="attention_backend=auto"):
        check_attention("triton", torch.device("cpu"))


@pytest.mark.parametrize(("precision", "peak"), [("bf16", 1e6), ("fp32", None)])
def test_mfu_is_a_share_of_the_bf16_peak_only_in_bf16(
    precision: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELS", "models")
    monkeypatch.setenv("SHARDS", "shards")
    monkeypatch.setattr(train, "peak_bf16_flops", lambda _device: 1e6)
    config = load_config(DEMO, [f"precision={precision}"])
    hooks = train._make_hooks(config, MagicMock(), MagicMock(), MagicMock(), MagicMock(), CollectiveCounter())
    assert [hook.peak_flops for hook in hooks if isinstance(hook, MetricsHook)] == [peak]

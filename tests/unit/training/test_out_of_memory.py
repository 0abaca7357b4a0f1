"""The message of a rank that has run out of memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from arc_ds.config.load import load_config
from arc_ds.config.schema import RunConfig
from arc_ds.errors import OutOfMemoryError
from arc_ds.launch.exit_codes import EXIT_OUT_OF_MEMORY, exit_code_of
from arc_ds.system import activity
from arc_ds.system.device import GIB
from arc_ds.training import out_of_memory
from arc_ds.training.memory import EngineMemory
from arc_ds.training.out_of_memory import explaining_memory

RECIPE = Path(__file__).resolve().parents[3] / "ds_configs" / "recipes" / "pretrain_llama31_8b.yaml"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("MODELS", "/models")
    monkeypatch.setenv("SHARDS", "/shards")
    return load_config(RECIPE, ["encoder.activation_checkpointing=false", "data.max_encoder_tokens=9000"])


def _message(config: RunConfig, fault: Any, run: Any = None) -> str:
    with pytest.raises(OutOfMemoryError) as caught, explaining_memory(config, run):
        fault()
    assert exit_code_of(caught.value) == EXIT_OUT_OF_MEMORY
    return str(caught.value)


def test_a_lack_of_host_memory_names_place_load_owners_and_settings(
    recipe: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's CPU allocator raises a plain RuntimeError."""
    monkeypatch.setattr(activity, "now", activity.Activity(step=3, module="encoder layer 1", load="micro-batch 1 of 2"))
    trained, frozen = nn.Linear(1, 1), nn.Linear(1, 1)
    held = {trained: EngineMemory(GIB, GIB // 4, GIB // 2, 3 * GIB), frozen: EngineMemory(2 * GIB, 0, 0, 0)}
    monkeypatch.setattr(out_of_memory, "engine_memory", lambda module, *_: held[module])
    run = SimpleNamespace(
        device=torch.device("cpu"),
        engine=SimpleNamespace(module=trained),
        decoders=[SimpleNamespace(module=frozen)],
    )
    message = _message(recipe, lambda: torch.empty(1 << 60), run)
    for words in (
        "rank 0 on ", "ran out of memory at step 3, encoder layer 1 (micro-batch 1 of 2)", "can't allocate memory",
        "weights of the compressor 1.00, gradients 0.50, optimizer 3.00, frozen decoders 2.00, gathered weights 0.25",
        "data.max_encoder_tokens (now 9000)", "encoder.activation_checkpointing=full", "zero3_offload.json",
    ):  # fmt: skip
        assert words in message


def test_pythons_and_the_gpus_errors_count_and_others_do_not(recipe: RunConfig) -> None:
    def lack(error: Exception) -> Any:
        def fault() -> None:
            raise error

        return fault

    assert "MemoryError" in _message(recipe, lack(MemoryError()))
    assert "CUDA out of memory" in _message(recipe, lack(torch.OutOfMemoryError("CUDA out of memory. Tried")))
    with pytest.raises(RuntimeError, match="shapes"), explaining_memory(recipe):
        raise RuntimeError("shapes do not match")

"""Secrets are removed from a run's config before it is shared, and checkpoints record what exports need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from arc_ds.checkpoints.trained_for import TrainedFor
from arc_ds.config.load import dump_yaml, load_config
from arc_ds.config.schema import SourceConfig
from arc_ds.errors import StorageError
from arc_ds.training import run_folder
from arc_ds.training.ports import PortRecord
from arc_ds.training.run import InputDigests
from arc_ds.training.run_folder import _trainer_state, check_shared, without_secrets

DEMO = Path(__file__).parents[3] / "ds_configs" / "recipes" / "demo.yaml"
SIGNED = "https://reader:SECRET@host/shards?signature=SECRET"


@pytest.mark.parametrize("validation", [SIGNED, (SourceConfig(path=SIGNED),), None])
def test_passwords_and_signatures_of_urls_are_not_tracked(
    monkeypatch: pytest.MonkeyPatch, validation: str | tuple[SourceConfig, ...] | None
) -> None:
    monkeypatch.setenv("MODELS", "models")
    monkeypatch.setenv("SHARDS", "shards")
    config = load_config(DEMO)
    sources = (SourceConfig(path=SIGNED, weight=2.0), SourceConfig(path="shards/plain"))
    tracking = replace(config.tracking, uri="postgresql://writer:SECRET@host/runs")
    secret = replace(config, data=replace(config.data, sources=sources, validation=validation), tracking=tracking)
    shown = without_secrets(secret)
    assert "SECRET" in dump_yaml(secret) and "SECRET" not in dump_yaml(shown)
    assert shown.data.sources[0].path.startswith("https://reader:…@host/shards") and shown.data.sources[0].weight == 2.0
    assert shown.data.sources[1] == sources[1]
    assert type(shown.data.validation) is type(validation)
    assert without_secrets(config) == config


def test_a_host_with_a_folder_of_its_own_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text("")
    check_shared(tmp_path)
    monkeypatch.setattr(run_folder, "_SHARED_WITHIN_S", 0.2)
    monkeypatch.setattr(run_folder.dist, "broadcast_object", lambda value: value + 1)  # rank 0 wrote another file
    with pytest.raises(
        StorageError, match=f"does not see the {tmp_path / 'config.yaml'} .*file system that they share"
    ):
        check_shared(tmp_path)


def test_a_checkpoint_records_what_an_export_needs_even_if_the_files_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS", "/gone")
    monkeypatch.setenv("SHARDS", "/gone")
    inputs = InputDigests(data="d", tokenizers={"encoder": "e"}, backbones={"encoder.backbone": "digest"})
    counts = {"step": 3, "skipped_steps": 0, "skipped_in_row": 0, "spikes": None, "data_counts": {}}
    spec = SimpleNamespace(to_json=dict)
    decoder = TrainedFor(name="d", rope_scaling="none", implementation="transformers", chat_template="chatml")
    record = PortRecord(decoder=decoder, ids_digest="i", weights={})
    ports = SimpleNamespace(spec=spec, records=(record,), places=(0,))
    encoder = torch.nn.Linear(2, 2)
    run = SimpleNamespace(inputs=inputs, ports=ports, engine=SimpleNamespace(module=encoder), **counts)
    for length in (33, 66):
        config = load_config(DEMO, [f"data.max_context_tokens={length}"])
        extra = _trainer_state(config, run, None).extra  # type: ignore[arg-type]
        assert extra["max_context_tokens"] == length
    assert (extra["tokenizers"]["encoder"], extra["decoder_ids"]) == ("e", ["i"])
    assert extra["decoder_weights"] == {"d": {}}
    assert extra["encoder_tokenizer"].startswith("/gone")
    assert [decoder["implementation"] for decoder in extra["decoders"]] == ["transformers"]
    assert [decoder["chat_template"] for decoder in extra["decoders"]] == ["chatml"]
    assert extra["frozen"] is None, "all weights are trained"
    encoder.bias.requires_grad_(False)
    frozen = _trainer_state(config, run, None).extra["frozen"]  # type: ignore[arg-type]
    assert (frozen["key"], frozen["digest"]) == ("encoder.backbone", "digest") and frozen["path"].startswith("/gone")

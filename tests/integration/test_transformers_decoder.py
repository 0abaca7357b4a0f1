"""A whole run with a decoder through transformers: train on two ranks of ZeRO-3, validate, export, generate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from arc_ds import ArcModel, Context
from arc_ds.cli import main
from tests.helpers.tiny_data import write_json_tokenizer
from tests.helpers.tiny_run import losses, numbers_by_step, train_on_ranks, write_inputs

pytest.importorskip("transformers")
pytestmark = pytest.mark.distributed


def test_partitioned_trains_like_whole_and_the_export_knows_its_decoder(tmp_path: Path) -> None:
    from tests.helpers.transformers_models import write_model

    config = write_inputs(tmp_path)
    write_model(tmp_path / "falcon", "FalconH1", vocab_size=352)
    write_json_tokenizer(tmp_path / "falcon")
    plain = yaml.safe_load(config.read_text())
    plain["decoders"] = [{"name": "falcon", "backbone": str(tmp_path / "falcon")}]
    plain["checkpoint"]["every"] = plain["validation"]["every"] = 2
    plain["optimizer"]["warmup_steps"] = 2
    config.write_text(yaml.safe_dump(plain))
    before = (tmp_path / "falcon" / "model.safetensors").read_bytes()

    code, console = train_on_ranks(config, [f"run_dir={tmp_path / 'whole'}", "steps=4"], num_ranks=1)
    assert code == 0, console
    assert "falcon reads padded batches through transformers" in console
    shards = ["decoders.0.placement=zero3", "decoders.0.activation_checkpointing=true", "steps=4"]
    code, console = train_on_ranks(config, [f"run_dir={tmp_path / 'shards'}", *shards])
    assert code == 0, console

    whole, found = losses(tmp_path / "whole"), losses(tmp_path / "shards")
    assert found == pytest.approx(whole, rel=1e-5) and len({*whole}) == 4
    scores = [numbers_by_step(tmp_path / run)[4] for run in ("whole", "shards")]
    key = "validation/falcon/continuation/nll_compressed"
    assert scores[0][key] == pytest.approx(scores[1][key], rel=1e-5)
    assert "train/mfu" not in scores[0]
    assert (tmp_path / "falcon" / "model.safetensors").read_bytes() == before

    assert main(["export", str(tmp_path / "shards"), str(tmp_path / "export")]) == 0
    settings = json.loads((tmp_path / "export" / "config.json").read_text())["decoders"]
    assert settings[0]["implementation"] == "transformers"
    assert settings[0]["chat_template"] == "none"
    model = ArcModel.from_checkpoint(tmp_path / "export", decoders=[tmp_path / "falcon"])
    prompts = [["The ", Context("wind came from the sea."), " It"], [Context("A lamp")]]
    lines = model.generate(prompts, max_new_tokens=8)
    assert lines == [model.generate([prompt], max_new_tokens=8)[0] for prompt in prompts] and any(lines)

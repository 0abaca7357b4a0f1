"""The model card: figures of the run's own records and no others, licences of the backbones, a snippet that runs."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from arc_ds.checkpoints.checkpoint import TrainerState, read_trainer_state
from arc_ds.config.load import config_hash, dump_yaml, load_config
from arc_ds.export.consolidate import consolidate
from arc_ds.export.formats import write_export
from arc_ds.export.training_record import read_license
from tests.helpers.tiny_export import tiny_trained, write_decoder
from tests.helpers.zero_checkpoint import seal, write_zero_checkpoint

FIGURES = {
    "validation/small/reconstruction/nll_compressed": 2.125,
    "validation/small/reconstruction/nll_mismatched": 4.25,
    "validation/small/reconstruction/nll_closed": 4.5,
    "validation/small/reconstruction/nll_open": 1.0625,
    "validation/small/reconstruction/gap_closed": 0.6667,
    "validation/small/reconstruction/num_samples": 24.0,
    "validation/seconds": 3.0,
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a config, metrics, and a checkpoint at step 8."""
    folder = tmp_path / "run"
    trained = tiny_trained(folder)
    decoder = write_decoder(tmp_path / "decoder")
    (decoder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Decoder\nlicense: none\n")
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "LICENSE.txt").write_text("Community licence")
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""run_dir: {folder}
steps: 16
seed: 5
encoder: {{backbone: {tmp_path / "encoder"}}}
decoders: [{{name: small, backbone: {decoder}}}]
data:
  sources: [{{path: "https://user:secret@host/shards?key=secret", weight: 2}}]
  validation: held_out
  batch_size: 32
optimizer: {{encoder_lr: 1e-5, bridge_lr: 1e-5, warmup_steps: 1}}
"""
    )
    settings = load_config(config)
    (folder / "config.yaml").write_text(dump_yaml(settings))
    lines = [{"step": step, "time": 0.0, "metrics": {"train/loss": 10.0 - step}} for step in range(1, 13)]
    lines.insert(4, {"step": 4, "time": 0.0, "metrics": {**FIGURES, "validation/small/gone/gap_closed": 0.1}})
    lines.insert(9, {"step": 8, "time": 0.0, "metrics": FIGURES})
    lines.append({"step": 12, "time": 0.0, "metrics": {name: 77.77 for name in FIGURES}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoint = write_zero_checkpoint(folder, trained, 1, step=8)
    state = dataclasses.asdict(read_trainer_state(checkpoint))
    state |= {
        "config_hash": config_hash(settings),
        "data_fingerprint": "f1f2",
        "versions": {"arc-ds": "9.9", "torch": "3"},
    }
    state["extra"]["decoders"][0]["name"] = "small"
    (checkpoint / "trainer.json").write_text(json.dumps(dataclasses.asdict(TrainerState(**state))))
    seal(checkpoint, step=8, world_size=1)
    return folder


def card_of(run: Path, out: Path) -> str:
    write_export(consolidate(run / "checkpoints" / "step_000008"), out)
    return (out / "README.md").read_text()


def test_the_figures_are_those_of_the_step(run: Path, tmp_path: Path) -> None:
    card = card_of(run, tmp_path / "out")
    assert "Training loss: 2.0000 nats per token at step 8" in card
    assert "over the 8 logged steps from 1 to 8: 5.5000" in card
    assert "Validation at step 8" in card
    assert "| small | reconstruction | 4.500 | 4.250 | 2.125 | 1.062 | 0.667 | 24 |" in card
    assert "gone" not in card and "77.77" not in card, "figures of another step"
    assert "`f1f2`" in card and "Seed: 5. Batch: 32 samples." in card and "arc-ds 9.9, torch 3" in card
    assert "host/shards" in card and "task pretraining, weight 2" in card and "secret" not in card
    assert f"| small | {tmp_path / 'decoder'} | apache-2.0 |" in card
    assert f"| encoder | {tmp_path / 'encoder'} | see its LICENSE.txt |" in card


def test_what_the_run_does_not_record_is_not_stated(run: Path, tmp_path: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line.replace('"validation/small/reconstruction/num_samples": 24.0, ', "") for line in lines]
    (run / "metrics.jsonl").write_text("".join(kept))
    assert "| 0.667 | not recorded |" in card_of(run, tmp_path / "without_counts")
    (run / "metrics.jsonl").write_text("".join(kept).replace("0.6667", "NaN"))
    assert "| 1.062 | undefined | not recorded |" in card_of(run, tmp_path / "without_a_gap")
    (run / "metrics.jsonl").unlink()
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("seed: 5", "seed: 6"))
    card = card_of(run, tmp_path / "out")
    assert "Training loss: not recorded" in card and "no validation up to this step" in card
    assert "Seed" not in card, "the config of another run"
    assert "| small | not recorded | unknown |" in card and "PATH_OF_small" in card


def test_the_snippet_runs_and_names_the_real_decoder(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = card_of(run, tmp_path / "out")
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert str(tmp_path / "decoder") in snippet
    names: dict[str, object] = {}
    exec(snippet, names)
    assert names["vectors"][0].shape[1] == 48  # type: ignore[index]
    assert capsys.readouterr().out.startswith("[")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("README.md", "---\nlicense: other\nlicense_name: x\n---\n", "other"),
        ("README.md", "license: mit", "unknown"),
        ("README.md", "---\nlicense:\n---\n", "unknown"),
        ("README.md", b"\xff\xfe\x00", "unknown"),
        ("LICENCE", "text", "see its LICENCE"),
        ("notes.txt", "text", "unknown"),
    ],
)
def test_licences_are_read_where_models_state_them(
    tmp_path: Path, name: str, content: str | bytes, expected: str
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_license(str(tmp_path)) == expected
    assert read_license(None) == read_license(str(tmp_path / "gone")) == "unknown"


def test_the_licence_of_a_gguf_file_is_in_its_metadata(tmp_path: Path) -> None:
    import gguf

    for name, stated in (("stated.gguf", "apache-2.0"), ("silent.gguf", None)):
        writer = gguf.GGUFWriter(str(tmp_path / name), "llama")
        if stated is not None:
            writer.add_license(stated)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    assert read_license(str(tmp_path / "stated.gguf")) == "apache-2.0"
    assert read_license(str(tmp_path / "silent.gguf")) == "unknown"

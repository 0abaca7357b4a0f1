"""The golden ARC checkpoints through every door: our export, an import of a release, a bridge that decoders share.

The last test lists all folders of the golden files, so that no new case goes unnoticed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from arc_ds.checkpoints.trained_for import TrainedFor
from arc_ds.cli import main
from arc_ds.export.consolidate import TrainedCompressor
from arc_ds.export.formats import write_export
from arc_ds.inference.load import load_compressor, open_arc_folder
from arc_ds.model.rope import ropes_at
from tests.helpers.tiny_models import tiny_config
from tests.parity.golden import GoldenCase
from tests.parity.golden_run import relative_error, run_case

CHECKPOINTS = {"arc_mlp": "float32", "arc_multi": "bfloat16"}
PARTS = {"embedder": "embedder/consolidated.safetensors", "bridge_module": "bridge_module/consolidated.safetensors"}
BOUND = 1e-5  # as in `test_golden_model.py`


def folder_of(golden: Path, name: str) -> Path:
    return golden / "arc_checkpoints" / name / "checkpoints" / "checkpoint_000010"


def check_same_files(ours: Path, theirs: Path) -> None:
    """The same tensors under the same names, byte by byte, and the same settings."""
    for part in PARTS.values():
        found, expected = load_file(ours / part), load_file(theirs / part)
        assert found.keys() == expected.keys() and expected
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert json.loads((ours / "params.json").read_text()) == json.loads((theirs / "params.json").read_text())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_through_our_export_is_written_back_byte_by_byte(golden: Path, tmp_path: Path, name: str) -> None:
    trained = read(folder_of(golden, name), golden)
    write_export(trained, tmp_path / "ours", dtype=CHECKPOINTS[name])
    again = read(tmp_path / "ours", golden)
    assert again.spec == trained.spec
    write_export(again, tmp_path / "theirs", export_format="arc", dtype=CHECKPOINTS[name])
    check_same_files(tmp_path / "theirs", folder_of(golden, name))


def read(folder: Path, golden: Path) -> TrainedCompressor:
    """A folder of weights as the input of an export."""
    opened = open_arc_folder(folder, golden / "models" / "enc")
    return TrainedCompressor(
        spec=opened.spec,
        tensors={n: opened.tensors.tensor(n).float() for n in opened.tensors.shapes},
        step=10,
        encoder_tokenizer=str(golden / "tokenizers" / "llama_tiny.tiktoken"),
        decoders=tuple(TrainedFor(name=f"decoder{n}", rope_scaling="none") for n in range(len(opened.decoders))),
    )


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_as_a_release_is_imported_byte_by_byte(golden: Path, tmp_path: Path, name: str) -> None:
    released = {}
    for prefix, part in PARTS.items():
        released |= {f"{prefix}.{n}": t for n, t in load_file(folder_of(golden, name) / part).items()}
    (tmp_path / "release").mkdir()
    save_file(released, tmp_path / "release" / "model.safetensors")
    backbone = f"--encoder-backbone={golden / 'models' / 'enc'}"
    assert main(["import", str(tmp_path / "release"), str(tmp_path / "out"), backbone, "--pooling-factor=4"]) == 0
    check_same_files(tmp_path / "out", folder_of(golden, name))


@pytest.mark.parametrize(("name", "port_idx"), [("pq_mean_cr4", 0), ("dec_llama", 1)])
def test_one_bridge_serves_both_decoders_with_the_golden_numbers(
    golden: Path, tmp_path: Path, name: str, port_idx: int
) -> None:
    """arc_mlp with markers for a second decoder, which equal those of the first. The reference reads it for both."""
    shutil.copytree(folder_of(golden, "arc_mlp"), tmp_path / "shared", copy_function=shutil.copyfile)
    embedder = tmp_path / "shared" / PARTS["embedder"]
    tensors = load_file(embedder)
    tensors |= {f"{marker}_tok.1.weight": tensors[f"{marker}_tok.0.weight"].clone() for marker in ("rec", "cont")}
    save_file(tensors, embedder)
    opened = open_arc_folder(tmp_path / "shared", golden / "models" / "enc")
    assert opened.spec.bridge_shared and opened.spec.decoder_sizes == (96, 96)
    compressor = load_compressor(opened.spec, opened.tensors, torch.device("cpu"), torch.float32)
    case = GoldenCase.read(golden, name)
    step = run_case(case, compressor=compressor, port_idx=port_idx)
    for output in ("enc.pooled", "comp.bridged", "logits", "token_nll", "loss_masked", "grad.enc.pooled"):
        assert relative_error(step.outputs[output], case.tensors[output]) < BOUND, output
    for leaf in ("layer1.weight", "layer2.weight"):
        found, stats = step.gradients[f"bridge.{leaf}"], case.meta["grad_stats"][f"bridge_module.{leaf}"]
        assert found is not None and abs(found.double().norm().item() - stats["l2"]) < BOUND * stats["l2"]
    with torch.no_grad():
        compressor.bridge.layer1.weight.neg_()
    wrong = run_case(case, compressor=compressor, port_idx=port_idx)
    assert relative_error(wrong.outputs["token_nll"], case.tensors["token_nll"]) > 1e-2


def test_rotary_angles_are_those_of_the_table(golden: Path) -> None:
    """The reference multiplies in float32, as we do. Angles near 1e5 have errors of 4e-3 there."""
    table = json.loads((golden / "tables" / "rope_freqs.json").read_text(encoding="utf-8"))
    assert len(table) == 4
    for key, by_position in table.items():
        theta, size = (float(part.lstrip("thead")) for part in key.split("_"))
        config = tiny_config(rope_theta=theta, head_dim=int(size))
        positions = sorted(map(int, by_position))
        rope = ropes_at(torch.tensor(positions), config, None)[0]
        for row, position in enumerate(positions):
            for ours, theirs in zip((rope.cos[row], rope.sin[row]), by_position[str(position)], strict=True):
                # One unit in the last place of the angle.
                assert (ours - torch.tensor(theirs)).abs().max() <= max(position, 1) * 2.0**-23, (key, position)
        assert (rope.cos[1] - rope.cos[0]).abs().max() > 0.1


def test_every_folder_of_the_golden_files_is_known(golden: Path) -> None:
    """Cases are listed by kind in their own files. `data` and the tables of the evaluation are described below."""
    kinds = {json.loads(path.read_text(encoding="utf-8"))["kind"] for path in golden.glob("*/meta.json")}
    assert kinds == {"forward_backward", "end_to_end", "decoder_only", "generate", "generate_pipeline"}
    decoder_only = {path.parent.name for path in golden.glob("plain_*/meta.json")}
    assert decoder_only == {"plain_decM", "plain_decO"}  # test_golden_decoder.py
    others = {path.name for path in golden.iterdir() if path.is_dir() and not (path / "meta.json").exists()}
    assert others == {"arc_checkpoints", "data", "models", "tables", "tokenizers", "train"}
    assert {path.name for path in (golden / "arc_checkpoints").iterdir()} == set(CHECKPOINTS)
    assert {path.stem for path in (golden / "tables").iterdir()} == {
        "split_integer", "pooled_lengths", "onecycle_lr", "rope_freqs",
        # The reference regroups contexts by the lengths of the insertion lists (oddity 17). We have no such lists.
        "group_embed_seqlens",
        # Evaluation.
        "eval_prompts", "eval_shuffle", "metrics",
    }  # fmt: skip

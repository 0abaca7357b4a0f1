"""Exports read the weights that a run did not train from the files that it started from, wherever these are now."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from arc_ds.checkpoints.frozen_source import FrozenSource
from arc_ds.checkpoints.weight_digests import weight_digests
from arc_ds.cli import main
from arc_ds.config.schema import EncoderConfig
from arc_ds.export.consolidate import TrainedCompressor, consolidate
from arc_ds.export.formats import write_export
from arc_ds.launch.exit_codes import EXIT_USER_ERROR
from arc_ds.model.weights import read_backbone_config
from tests.helpers.tiny_export import ENCODER, tiny_trained
from tests.helpers.tiny_models import random_tensors, write_gguf, write_hf
from tests.helpers.zero_checkpoint import write_zero_checkpoint

FROZEN = ("encoder.",)


def source_of(encoder: EncoderConfig, dtype: Any = "float32") -> FrozenSource:
    """The record that a run with this encoder writes."""
    sizes = read_backbone_config(encoder.backbone, encoder.rope_scaling)
    key: Any = "encoder.backbone" if encoder.init_from is None else "encoder.init_from"
    return FrozenSource(
        key=key,
        path=str(encoder.init_from or encoder.backbone),
        digest=weight_digests(encoder, sizes, {})[key],
        backbone=str(encoder.backbone),
        rope_scaling=encoder.rope_scaling,
        dtype=dtype,
    )


def hugging_face(folder: Path, seed: int = 2) -> Path:
    return write_hf(folder / "backbone", ENCODER, random_tensors(ENCODER, seed))


def gguf(folder: Path, seed: int = 2) -> Path:
    folder.mkdir(exist_ok=True)
    return write_gguf(folder / "backbone.gguf", ENCODER, random_tensors(ENCODER, seed))


def start_from_backbone(folder: Path, write: Callable[[Path], Path]) -> tuple[TrainedCompressor, EncoderConfig]:
    """A compressor whose encoder has the weights of a backbone."""
    encoder = EncoderConfig(backbone=str(write(folder)))
    trained = tiny_trained(folder)
    theirs = random_tensors(ENCODER, 2)
    tensors = {
        name: theirs[name.removeprefix("encoder.")] if name.startswith(FROZEN) else tensor
        for name, tensor in trained.tensors.items()
    }
    return dataclasses.replace(trained, tensors=tensors), encoder


def start_from_arc(folder: Path) -> tuple[TrainedCompressor, EncoderConfig]:
    """A compressor whose encoder has the weights of a checkpoint of the reference, which lacks the backbone's sizes."""
    trained = tiny_trained(folder)
    write_export(trained, folder / "backbone_of_arc", export_format="arc")
    for name in ("encoder_backbone.json", "decoders.json", "checksums.json"):
        (folder / "backbone_of_arc" / name).unlink()
    return trained, EncoderConfig(backbone=str(hugging_face(folder)), init_from=str(folder / "backbone_of_arc"))


STARTS: dict[str, Callable[[Path], tuple[TrainedCompressor, EncoderConfig]]] = {
    "hugging face": lambda folder: start_from_backbone(folder, hugging_face),
    "gguf": lambda folder: start_from_backbone(folder, gguf),
    "arc": start_from_arc,
}


@pytest.mark.parametrize("start", STARTS)
def test_frozen_weights_are_found_where_they_are_and_no_others_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], start: str
) -> None:
    trained, encoder = STARTS[start](tmp_path / "start")
    source = source_of(encoder)
    write_zero_checkpoint(tmp_path / "run", trained, 2, frozen=FROZEN, extra={"frozen": asdict(source)})
    export = ["export", str(tmp_path / "run")]
    assert main([*export, str(tmp_path / "out")]) == 0
    path, moved = Path(source.path), tmp_path / f"moved{Path(source.path).suffix}"
    path.rename(moved)
    assert main([*export, str(tmp_path / "none")]) == EXIT_USER_ERROR
    message = capsys.readouterr().err
    assert f"{source.key} of the run" in message and "to --encoder" in message and str(path) in message
    assert "the checkpoint does not hold them: encoder." in message
    assert main([*export, str(tmp_path / "again"), "--encoder", str(moved)]) == 0
    for out in ("out", "again"):
        found = load_file(tmp_path / out / "model.safetensors")
        assert found.keys() == trained.tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in trained.tensors.items())
    other = gguf(tmp_path / "other", 3) if start == "gguf" else hugging_face(tmp_path / "other", 3)
    (shutil.copytree if other.is_dir() else shutil.copyfile)(other, path)
    assert main([*export, str(tmp_path / "none")]) == EXIT_USER_ERROR
    assert f"The run started from other weights ({source.key}={path}) than {path} holds now" in capsys.readouterr().err


def test_the_sizes_that_an_arc_checkpoint_lacks_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained, encoder = start_from_arc(tmp_path / "start")
    extra = {"frozen": asdict(source_of(encoder))}
    write_zero_checkpoint(tmp_path / "run", trained, 1, frozen=FROZEN, extra=extra)
    backbone = Path(encoder.backbone)
    backbone.rename(tmp_path / "moved")
    export = ["export", str(tmp_path / "run"), str(tmp_path / "out")]
    assert main(export) == EXIT_USER_ERROR
    assert f"put its config.json or params.json back at {backbone}" in capsys.readouterr().err
    backbone.mkdir()
    shutil.copyfile(tmp_path / "moved" / "config.json", backbone / "config.json")
    assert main(export) == 0


def test_frozen_weights_have_the_precision_of_the_run(tmp_path: Path) -> None:
    trained, encoder = start_from_backbone(tmp_path / "start", hugging_face)
    extra = {"frozen": asdict(source_of(encoder, "bfloat16"))}
    found = consolidate(write_zero_checkpoint(tmp_path / "run", trained, 1, frozen=FROZEN, extra=extra)).tensors
    for name, tensor in trained.tensors.items():
        expected = tensor.bfloat16().float() if name.startswith(FROZEN) else tensor
        assert torch.equal(found[name].whole(), expected), name  # type: ignore[union-attr]
    assert not torch.equal(expected, trained.tensors[name].bfloat16().float()), "all weights are bfloat16 numbers"

"""Places of tensors in files of `torch.save`: equal to what torch loads, and no code of the pickle runs."""

from __future__ import annotations

import enum
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from arc_ds.checkpoints.torch_file import StoredTensor, read_torch_file
from arc_ds.errors import CheckpointError


class Stage(enum.IntEnum):
    weights = 3


class Scaler:
    def __init__(self) -> None:
        self.scale, self.seen = 2.0, [1]


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["EVIL"],)


def test_tensors_are_read_where_torch_put_them(tmp_path: Path) -> None:
    flat = torch.randn(20)
    flat.ds_id = "1_2"  # DeepSpeed sets attributes on its flat groups
    saved = {
        "list": [flat, flat[5:9]],
        "half": torch.randn(3, 4).half(),
        "bf16": torch.nn.Parameter(torch.randn(2, 2).bfloat16()),
        "shapes": OrderedDict(a=torch.Size([3, 4])),
        "objects": (Stage.weights, Scaler(), None, 1.5, "text"),
    }
    torch.save(saved, tmp_path / "file.pt")
    found = read_torch_file(tmp_path / "file.pt")
    assert list(found) == list(saved) and found["shapes"]["a"] == (3, 4)
    assert found["objects"][2:] == (None, 1.5, "text")
    for ours, theirs in (
        (found["list"][0], flat),
        (found["list"][1], flat[5:9]),
        (found["half"], saved["half"]),
        (found["bf16"], saved["bf16"].detach()),
    ):
        assert isinstance(ours, StoredTensor) and ours.shape == tuple(theirs.shape)
        assert torch.equal(ours.read(0, theirs.numel()).reshape(theirs.shape), theirs)
    assert torch.equal(found["list"][1].read(1, 3), flat[6:8]) and not torch.equal(flat[6:8], flat[5:7])


def test_no_code_in_a_pickle_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVIL", str(tmp_path / "evil"))
    torch.save({"weights": torch.ones(2), "evil": Evil()}, tmp_path / "file.pt")
    found = read_torch_file(tmp_path / "file.pt")
    assert torch.equal(found["weights"].read(0, 2), torch.ones(2)) and not (tmp_path / "evil").exists()
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "evil").exists(), "the pickle is harmless, so the test shows nothing"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cannot be read as a file of torch.save"),
        (lambda path: path.write_bytes(b"x" * 1000), "cannot be read as a file of torch.save"),
        (lambda path: torch.save({"t": torch.ones(2, 3).t()}, path), "of strides"),
        (lambda path: torch.save([], path, _use_new_zipfile_serialization=False), "cannot be read as a file"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    path = tmp_path / "file.pt"
    torch.save({"weights": torch.ones(100)}, path)
    damage(path)
    with pytest.raises(CheckpointError, match=f"file.pt.*{message}"):
        read_torch_file(path)


def test_a_file_that_was_cut_meanwhile_is_named(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(100)}, tmp_path / "file.pt")
    weights = read_torch_file(tmp_path / "file.pt")["weights"]
    (tmp_path / "file.pt").write_bytes((tmp_path / "file.pt").read_bytes()[: weights.offset + 40])
    with pytest.raises(CheckpointError, match="has become shorter"):
        weights.read(0, 100)

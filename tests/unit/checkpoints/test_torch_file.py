"""Places of tensors in files of `torch.save`: equal to what torch loads, and no code of the pickle runs."""

from __future__ import annotations

import enum
import pickle
import tracemalloc
import zipfile
from collections import OrderedDict
from contextlib import suppress
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


def write_pickle(path: Path, pickled: bytes, *, compression: int = zipfile.ZIP_STORED) -> None:
    """A file of torch.save with a pickle of one's own and a storage of 4 floats."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("file/data.pkl", pickled)
        archive.writestr("file/byteorder", b"little")
        archive.writestr("file/data/0", bytes(16))


def tensor_of(first: str, shape: str, *, key: str = "'0'", dtype: str = "ctorch\nFloatStorage\n") -> bytes:
    """The pickle of a tensor in the text protocol."""
    storage = f"(V\n{dtype}S{key}\nVcpu\nI4\ntQ"
    return f"ctorch._utils\n_rebuild_tensor_v2\n({storage}{first}({shape}t(I1\nt(dtR.".encode()


NESTED = b"ctorch._tensor\n_rebuild_from_type_v2\np0\n0(lp1\ng0\nag1\nag1\nag1\na0g0\n(g0\nNg1\nNtR."
FORMS = {
    "reduce": (b"cos\nmkdir\n(V{evil}\ntR.", None),
    "inst": (b"(V{evil}\nios\nmkdir\n.", None),
    "obj": (b"(cos\nmkdir\nV{evil}\no.", None),
    "getattr": (b"cbuiltins\ngetattr\n(cos\nmkdir\nV__call__\ntRp0\n0g0\n(V{evil}\ntR.", "not callable"),
    "rebuild_from_type": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nmkdir\nN(V{evil}\ntNtR.",
        None,
    ),
    "build": (b"cos\nmkdir\n(V{evil}\ntR(dVmode\nI1\nsb.", None),
    "recursion": (NESTED, ""),
    "beyond the storage": (tensor_of("I0\n", "I5\n"), r"shape \[5\] lies outside its storage of 16 bytes"),
    "offset beyond": (tensor_of("I2\n", "I3\n"), "lies outside"),
    "negative offset": (tensor_of("I-1\n", "I1\n"), "lies outside"),
    "negative size": (tensor_of("I0\n", "I-1\n"), "lies outside"),
    "fractions": (tensor_of("I0\n", "F1.5\n"), "lies outside"),
    "huge": (tensor_of("I0\n", f"L{10**30}L\n"), "lies outside"),
    "missing storage": (tensor_of("I0\n", "I4\n", key="'7'"), "file/data/7"),
    "no dtype": (tensor_of("I0\n", "I4\n", dtype="cos\nsystem\n"), ""),
    "persistent id": (b"Pfile\n.", ""),
    "empty": (b"", ""),
    "cut": (b"\x80\x02}q\x00(X\x05", ""),
    "memo": (b"\x80\x02Nr\xff\xff\xff\x7f.", None),
    "claimed bytes": (b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b".", ""),
}


@pytest.mark.parametrize("form", FORMS)
def test_hostile_pickles_run_nothing_and_are_one_error(tmp_path: Path, form: str) -> None:
    pickled, message = FORMS[form]
    evil, path = tmp_path / "evil", tmp_path / "file.pt"
    write_pickle(path, pickled.replace(b"{evil}", str(evil).encode()))
    tracemalloc.start()
    try:
        if message is None:
            read_torch_file(path)
        else:
            with pytest.raises(CheckpointError, match=f"file.pt cannot be read as a file of torch.save: .*{message}"):
                read_torch_file(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert not evil.exists()
    if form in ("reduce", "inst", "obj", "getattr"):
        with suppress(Exception):
            pickle.loads(pickled.replace(b"{evil}", str(evil).encode()))
        assert evil.exists(), "the pickle is harmless, so the test shows nothing"


def test_a_compressed_file_is_named(tmp_path: Path) -> None:
    write_pickle(tmp_path / "file.pt", tensor_of("I0\n", "I4\n"))
    assert read_torch_file(tmp_path / "file.pt").read(0, 4).tolist() == [0.0] * 4
    write_pickle(tmp_path / "file.pt", tensor_of("I0\n", "I4\n"), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="it is compressed"):
        read_torch_file(tmp_path / "file.pt")


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

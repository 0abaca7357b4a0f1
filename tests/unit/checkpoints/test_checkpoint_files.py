"""The parts of a checkpoint that need no engine: manifest, pruning, random states, resharding."""

from __future__ import annotations

import errno
import json
import random
import shutil
import socket
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arc_ds.checkpoints import checkpoint, manifest, writer
from arc_ds.checkpoints.checkpoint import (
    CheckpointRemoved,
    TrainerState,
    check_checkpoint,
    find_resumable,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    step_of,
)
from arc_ds.checkpoints.manifest import read_manifest
from arc_ds.checkpoints.rng import capture_rng, restore_rng
from arc_ds.checkpoints.shards import MASTER, SavedParameter, open_shards
from arc_ds.checkpoints.writer import CheckpointWriter
from arc_ds.errors import CheckpointError, StorageError
from tests.helpers.full_disk import limited_file_size
from tests.helpers.light_engine import light_engine
from tests.helpers.zero_checkpoint import seal


def _make(directory: Path, step: int) -> Path:
    folder = directory / f"step_{step:06d}"
    (folder / "sub").mkdir(parents=True)
    (folder / "weights.pt").write_bytes(bytes(range(256)) * 8)
    (folder / "sub" / "trainer.json").write_text("{}")
    seal(folder, step=step, world_size=2)
    return folder


def test_manifest_reads_back_as_written(tmp_path: Path) -> None:
    folder = _make(tmp_path, 7)
    found = read_manifest(folder)
    assert (found.step, found.world_size) == (7, 2)
    assert [entry.path for entry in found.files] == ["sub/trainer.json", "weights.pt"]
    assert check_checkpoint(folder) == []
    for entry in found.files:
        (folder / entry.path).unlink()
    assert len(check_checkpoint(folder)) == 2


def test_an_altered_manifest_makes_the_checkpoint_unfit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, newer = _make(tmp_path, 1), _make(tmp_path, 2)
    path = newer / MANIFEST
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))
    assert find_resumable(tmp_path) == whole
    assert str(newer) in caplog.text


def test_a_manifest_of_another_version_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arc_ds.checkpoints.manifest.MANIFEST_VERSION", 9)
    folder = _make(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="version 9"):
        read_manifest(folder)


def test_nothing_to_resume_is_none(tmp_path: Path) -> None:
    assert find_resumable(tmp_path / "absent") is None
    (tmp_path / ".tmp-step_000001").mkdir()
    (tmp_path / "step_x").mkdir()
    assert find_resumable(tmp_path) is None


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (999999, 1000000, 5):
        (tmp_path / f"step_{step:06d}").mkdir()
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [5, 999999, 1000000]
    with pytest.raises(CheckpointError, match="not a checkpoint folder"):
        step_of(tmp_path / "elsewhere")


def test_pruning_keeps_the_last_ones_and_every_nth_and_does_not_count_torn_ones(tmp_path: Path) -> None:
    for step in range(1, 8):
        _make(tmp_path, step)
    (tmp_path / "step_000007" / "weights.pt").unlink()
    prune_checkpoints(tmp_path, keep_last=2, keep_every=3)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [3, 5, 6, 7]


def test_random_states_survive_json() -> None:
    random.gauss(0, 1)
    state = json.loads(json.dumps(capture_rng()))
    wanted = (random.gauss(0, 1), np.random.rand(), torch.rand(3).tolist())
    assert (random.gauss(0, 1), np.random.rand(), torch.rand(3).tolist()) != wanted
    restore_rng(state, "here")
    assert (random.gauss(0, 1), np.random.rand(), torch.rand(3).tolist()) == wanted


@given(numel=st.integers(1, 60), before=st.integers(1, 9), after=st.integers(1, 9), offset=st.integers(0, 3))
def test_pieces_cut_anew_hold_every_element_once(numel: int, before: int, after: int, offset: int) -> None:
    def deal(ranks: int) -> list[torch.Tensor]:
        size = -(-numel // ranks)
        padded = torch.zeros(size * ranks)
        padded[:numel] = torch.arange(1, numel + 1)
        return list(padded.chunk(ranks))

    flats = [_InMemory(torch.cat([torch.full([offset], -1.0), piece])) for piece in deal(before)]
    saved = SavedParameter(shape=(numel,), flats={MASTER: flats}, offset=offset)  # type: ignore[dict-item]
    found = [saved.piece(MASTER, rank=rank, world_size=after) for rank in range(after)]
    assert all(torch.equal(left, right) for left, right in zip(found, deal(after), strict=True))


class _InMemory:
    """A flat tensor that stands for one in a file."""

    def __init__(self, flat: torch.Tensor) -> None:
        self.flat = flat

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self.flat[start:stop]


def test_a_full_disk_names_the_checkpoint_that_is_whole_and_the_next_save_succeeds(tmp_path: Path) -> None:
    def save(step: int) -> Path:
        return _saved(tmp_path / "checkpoints", step)

    with limited_file_size(2000), pytest.raises(StorageError, match=r"step_000003 cannot .*has no checkpoint yet"):
        save(3)
    save(6)
    with limited_file_size(2000), pytest.raises(StorageError, match=r"step_000009 cannot .*step_000006 is whole"):
        save(9)
    assert check_checkpoint(save(9)) == [] and not list((tmp_path / "checkpoints").glob(".*"))


def _saved(directory: Path, step: int, *, keep_last: int = 9) -> Path:
    state = TrainerState(step=step, data_position=0, data_fingerprint="", config_hash="")
    waiting = CheckpointWriter(directory, keep_last=keep_last, keep_every=0, asynchronous=False)
    return waiting.save(light_engine(float(step)), state, KEPT)


KEPT = {"ports.0.rec": torch.ones(1, 4)}
FILES = ("shard_00000.safetensors", "shards.json", "rng_00000.json", "trainer.json", "kept_ports.safetensors",
         "manifest.json")  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_damage_to_any_file_of_a_checkpoint_is_named_and_the_one_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    earlier, newest = _saved(tmp_path, 1), _saved(tmp_path, 2)
    assert sorted(path.name for path in newest.iterdir()) == sorted(FILES)
    assert find_resumable(tmp_path) == newest
    path = newest / name
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if damage == "flipped":
        content[middle] ^= 1
    path.unlink() if damage == "missing" else path.write_bytes(content if damage == "flipped" else content[:middle])
    assert find_resumable(tmp_path) == earlier
    assert str(path) in caplog.text or (name == "manifest.json" and str(newest) in caplog.text)
    if name != "manifest.json":
        words = {"flipped": "has checksum", "truncated": f"has {middle} bytes", "missing": "cannot be read"}
        assert words[damage] in caplog.text


def test_our_files_hold_the_state_of_the_engine(tmp_path: Path) -> None:
    (parameter,) = open_shards(_saved(tmp_path, 3), 1).trained.values()
    assert parameter.shape == (5000,) and parameter.scalars == {"step": 3.0}
    assert all(torch.equal(parameter.read(0, 5000, state), torch.full([5000], 3.0)) for state in parameter.flats)


def test_a_checkpoint_that_cannot_be_removed_is_named_and_removed_after_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On NFS, a folder with a file that a reader has open cannot be removed. The new checkpoint is whole."""
    _saved(tmp_path, 1)
    full = OSError(errno.ENOTEMPTY, "Directory not empty")
    with monkeypatch.context() as readers:
        readers.setattr(checkpoint.shutil, "rmtree", Mock(side_effect=full))
        assert check_checkpoint(_saved(tmp_path, 2, keep_last=1)) == []
    assert f"{tmp_path / '.trash-step_000001'} cannot be deleted now: Directory not empty" in caplog.text
    _saved(tmp_path, 3, keep_last=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000003"]


def _in_header(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """A change of the header of a safetensors file."""

    def changed(content: bytes) -> bytes:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        change(header)
        encoded = json.dumps(header).encode()
        return len(encoded).to_bytes(8, "little") + encoded + content[8 + size :]

    return changed


def _in_json(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """A change of the object in a JSON file."""

    def changed(content: bytes) -> bytes:
        plain = json.loads(content)
        change(plain)
        return json.dumps(plain).encode()

    return changed


def _of_first_group(**changes: Any) -> Callable[[bytes], bytes]:
    return _in_json(lambda plain: plain["sub_groups"][0].update(changes))


SHARD, INDEX, RNG, TRAINER, _, MANIFEST = FILES
NESTED = b"[" * 100_000
EVIL = b"cos\nmkdir\n(Vevil\ntR."  # the pickle of a call that makes a folder
HOSTILE: list[tuple[str, Callable[[bytes], bytes]]] = [
    *((name, lambda _, content=content: content) for name in FILES  # type: ignore[misc]
      for content in (b"", b"null", b"[]", b"\xff" * 100, NESTED, EVIL)
      if name != "kept_ports.safetensors"),  # resume does not read it
    (SHARD, lambda content: b"\xff" * 8 + content[8:]),
    (SHARD, _in_header(lambda header: header["0.master"].update(dtype="F16"))),
    (SHARD, _in_header(lambda header: header["0.master"].update(data_offsets=[0, 1 << 62]))),
    (SHARD, _in_header(lambda header: header["0.master"].update(data_offsets=[1 << 62, (1 << 62) + 20_000]))),
    (SHARD, _in_header(lambda header: header["0.master"].update(data_offsets=[0.0, 20_000.0]))),
    (SHARD, _in_header(lambda header: header["0.master"].update(data_offsets=[-20_000, 0]))),
    (SHARD, _in_header(lambda header: header["0.master"].update(shape=[4000]))),
    (SHARD, _in_header(lambda header: header["0.master"].update(shape=[-5000.0, -1]))),
    (SHARD, _in_header(lambda header: header.pop("0.master"))),
    (SHARD, _in_header(lambda header: header.pop("0.exp_avg"))),
    (SHARD, _in_header(lambda header: header.update({"0.more": header["0.master"]}))),
    (INDEX, _of_first_group(shapes={"encoder.weight": [-50, -100]})),
    (INDEX, _of_first_group(shapes={"encoder.weight": [5000.0]})),
    (INDEX, _of_first_group(shapes={"encoder.weight": [50, 100]})),
    (INDEX, _of_first_group(shapes={"encoder.weight": [1 << 62, 1 << 62]})),
    (INDEX, _of_first_group(shapes={f"w{idx}": [1] for idx in range(5000)})),
    (INDEX, _of_first_group(scalars={"step": "x"})),
    (INDEX, _of_first_group(scalars={"step": -1})),
    (INDEX, _of_first_group(scalars={"step": float("nan")})),
    (INDEX, _of_first_group(scalars={})),
    (INDEX, _in_json(lambda plain: plain.update(counters={"module": "x"}))),
    (INDEX, _in_json(lambda plain: plain.update(sub_groups=plain["sub_groups"] * 2))),
    (RNG, _in_json(lambda plain: plain["numpy"].__setitem__(2, 1 << 30))),
    (RNG, _in_json(lambda plain: plain["numpy"].__setitem__(1, [1 << 40] * 624))),
    (RNG, _in_json(lambda plain: plain["python"].__setitem__(1, [1 << 70] * 625))),
    (RNG, _in_json(lambda plain: plain.update(torch="AAAA"))),
    (TRAINER, _in_json(lambda plain: plain.update(step="1"))),
    (TRAINER, _in_json(lambda plain: plain.update(step=-1))),
    (TRAINER, _in_json(lambda plain: plain.update(extra=[]))),
    (TRAINER, _in_json(lambda plain: plain.update(of_a_later_version=1))),
    (MANIFEST, _in_json(lambda plain: plain.update(files=[{"path": "/dev/zero", "size": 0, "xxh128": ""}]))),
    (MANIFEST, _in_json(lambda plain: plain["files"][0].update(path="../../secret"))),
    (MANIFEST, _in_json(lambda plain: plain["files"][0].update(path=5))),
    (MANIFEST, _in_json(lambda plain: plain["files"][0].pop("size"))),
    (MANIFEST, _in_json(lambda plain: plain.update(files=3))),
    (MANIFEST, _in_json(lambda plain: plain.update(world_size="1"))),
    (MANIFEST, _in_json(lambda plain: plain.update(world_size=0))),
    (MANIFEST, _in_json(lambda plain: plain.update(world_size=10**30))),
    (MANIFEST, _in_json(lambda plain: plain.pop("step"))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change"), HOSTILE)
def test_hostile_files_under_a_valid_manifest_are_one_error_and_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[bytes], bytes]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = _saved(tmp_path / "checkpoints", 1) / name
    path.write_bytes(change(path.read_bytes()))
    if name != MANIFEST:
        seal(path.parent, step=1, world_size=1)
    elif path.read_bytes().startswith(b"{"):
        plain = {key: value for key, value in json.loads(path.read_bytes()).items() if key != "digest"}
        path.write_text(json.dumps({**plain, "digest": manifest._digest(plain)}))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            if faults := check_checkpoint(path.parent):
                raise CheckpointError("; ".join(faults))
            load_checkpoint(light_engine(), path.parent)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert str(path.parent) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "evil").exists()


def test_an_error_elsewhere_waits_for_the_save_in_flight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`close` needs no other rank."""
    closing, real = threading.Event(), writer.write_shards

    def write_shards(*arguments: Any) -> Any:
        assert closing.wait(60)
        return real(*arguments)

    monkeypatch.setattr(writer, "write_shards", write_shards)
    background = CheckpointWriter(tmp_path, keep_last=1, keep_every=0, asynchronous=True)
    background.save(light_engine(), TrainerState(step=1, data_position=0, data_fingerprint="", config_hash=""))
    assert not (tmp_path / "step_000001").exists()
    threading.Timer(0.05, closing.set).start()
    background.close()
    assert check_checkpoint(tmp_path / "step_000001") == []


def test_a_part_that_rank_0_never_sees_is_an_error_that_names_its_rank_and_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the other host had a folder of its own."""
    monkeypatch.setattr(writer, "_PATIENCE_S", 0.2)
    background = CheckpointWriter(tmp_path, keep_last=1, keep_every=0, asynchronous=True)
    with monkeypatch.context() as two_ranks:
        two_ranks.setattr(writer.dist, "world_size", lambda: 2)
        state = TrainerState(step=2, data_position=0, data_fingerprint="", config_hash="")
        background.save(light_engine(), state)
    message = f"rank 1 has written its part, but {socket.gethostname()} does not see it in {tmp_path}"
    with pytest.raises(StorageError, match=message):
        background.finish()
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_its_run_removes_while_another_run_starts_from_it_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _saved(tmp_path, 3)

    def vanish(path: Path, world_size: int) -> None:
        shutil.rmtree(path)
        raise FileNotFoundError(2, "no such file", "shard_00000.safetensors")

    monkeypatch.setattr("arc_ds.checkpoints.checkpoint.open_shards", vanish)
    with pytest.raises(CheckpointRemoved, match=r"step_000003 was removed while it was read"):
        load_checkpoint(light_engine(), folder)

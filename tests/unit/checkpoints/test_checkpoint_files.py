"""The parts of a checkpoint that need no engine: manifest, pruning, random states, resharding."""

from __future__ import annotations

import json
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arc_ds.checkpoints import writer
from arc_ds.checkpoints.checkpoint import (
    CheckpointRemoved,
    TrainerState,
    check_checkpoint,
    find_resumable,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    read_trainer_state,
    step_of,
)
from arc_ds.checkpoints.manifest import read_manifest
from arc_ds.checkpoints.rng import capture_rng, restore_rng
from arc_ds.checkpoints.shards import MASTER, SavedParameter, open_shards
from arc_ds.checkpoints.writer import CheckpointWriter, save_checkpoint
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
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.world_size) == (7, 2)
    assert [entry.path for entry in manifest.files] == ["sub/trainer.json", "weights.pt"]
    assert check_checkpoint(folder) == []


@pytest.mark.parametrize("position", [0, 1000, 2047])
def test_a_flipped_byte_is_found(tmp_path: Path, position: int) -> None:
    folder = _make(tmp_path, 1)
    content = bytearray((folder / "weights.pt").read_bytes())
    content[position] ^= 4
    (folder / "weights.pt").write_bytes(content)
    (fault,) = check_checkpoint(folder)
    assert "weights.pt" in fault and "checksum" in fault


def test_a_short_and_a_missing_file_are_found(tmp_path: Path) -> None:
    folder = _make(tmp_path, 1)
    (folder / "weights.pt").write_bytes(b"short")
    (folder / "sub" / "trainer.json").unlink()
    faults = check_checkpoint(folder)
    assert len(faults) == 2 and "5 bytes" in "".join(faults) and "trainer.json" in "".join(faults)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text(path.read_text()[:40]),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text(path.read_text().replace('"step": 2', '"step": 3')),
    ],
    ids=["missing", "torn", "no object", "altered"],
)
def test_a_damaged_manifest_makes_the_checkpoint_unfit(tmp_path: Path, damage, caplog) -> None:  # type: ignore[no-untyped-def]
    whole, newer = _make(tmp_path, 1), _make(tmp_path, 2)
    damage(newer / "manifest.json")
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


def test_trainer_state_that_cannot_be_read_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "trainer.json").write_text('{"step": 1, "unknown": 2}')
    with pytest.raises(CheckpointError, match=r"trainer\.json"):
        read_trainer_state(tmp_path)


def test_random_states_survive_json() -> None:
    random.gauss(0, 1)
    state = json.loads(json.dumps(capture_rng()))
    wanted = (random.gauss(0, 1), np.random.rand(), torch.rand(3).tolist())
    assert (random.gauss(0, 1), np.random.rand(), torch.rand(3).tolist()) != wanted
    restore_rng(state)
    assert (random.gauss(0, 1), np.random.rand(), torch.rand(3).tolist()) == wanted


def test_random_states_of_another_program_are_refused() -> None:
    with pytest.raises(CheckpointError, match="random states"):
        restore_rng({"python": [3, [1, 2], None]})


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
        state = TrainerState(step=step, data_position=0, data_fingerprint="", config_hash="")
        return save_checkpoint(light_engine(), tmp_path / "checkpoints", state, keep_last=2, keep_every=0)

    with limited_file_size(2000), pytest.raises(StorageError, match=r"step_000003 cannot .*has no checkpoint yet"):
        save(3)
    save(6)
    with limited_file_size(2000), pytest.raises(StorageError, match=r"step_000009 cannot .*step_000006 is whole"):
        save(9)
    assert check_checkpoint(save(9)) == [] and not list((tmp_path / "checkpoints").glob(".*"))


def _saved(tmp_path: Path, step: int) -> Path:
    state = TrainerState(step=step, data_position=0, data_fingerprint="", config_hash="")
    return save_checkpoint(light_engine(float(step)), tmp_path, state, keep_last=9, keep_every=0, kept=KEPT)


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


def test_our_files_hold_the_state_of_the_engine(tmp_path: Path) -> None:
    (parameter,) = open_shards(_saved(tmp_path, 3), 1).trained.values()
    assert parameter.shape == (5000,) and parameter.scalars == {"step": 3.0}
    assert all(torch.equal(parameter.read(0, 5000, state), torch.full([5000], 3.0)) for state in parameter.flats)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["0.master"].update(dtype="F16"),
        lambda header: header["0.master"].update(data_offsets=[0, 1 << 40]),
        lambda header: header["0.master"].update(shape=[4000]),
        lambda header: header.pop("0.master"),
    ],
    ids=["dtype", "beyond the end", "shape", "no weights"],
)
def test_a_file_of_another_layout_is_refused(tmp_path: Path, change: Any) -> None:
    path = _saved(tmp_path, 1) / "shard_00000.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + size :])
    with pytest.raises(CheckpointError, match=r"do not have the layout of a ZeRO-3 engine|elements on its ranks"):
        open_shards(path.parent, 1)


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


def test_a_checkpoint_that_its_run_removes_while_another_run_starts_from_it_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _make(tmp_path, 3)

    def vanish(path: Path, world_size: int) -> None:
        shutil.rmtree(path)
        raise FileNotFoundError(2, "no such file", "shard_00000.safetensors")

    monkeypatch.setattr("arc_ds.checkpoints.checkpoint.open_shards", vanish)
    with pytest.raises(CheckpointRemoved, match=r"step_000003 was removed while it was read"):
        load_checkpoint(light_engine(), folder)

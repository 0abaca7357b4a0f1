"""Atomic writes of files and folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from arc_ds.system.files import whole_file, whole_folder, write_whole


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    write_whole(tmp_path / "latest", "a")
    write_whole(tmp_path / "latest", b"\xff")
    assert (tmp_path / "latest").read_bytes() == b"\xff"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_error_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    write_whole(tmp_path / "latest", "old")
    with pytest.raises(RuntimeError), whole_file(tmp_path / "latest") as file:
        file.write(b"half")
        raise RuntimeError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("latest", "old")]


def test_the_content_is_on_the_disk_before_the_file_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(Path, "replace", lambda self, target: (events.append("rename"), replace(self, target)))
    write_whole(tmp_path / "latest", "a")
    assert events == ["fsync", "rename", "fsync"]  # file, file name, folder


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "above" / "out"
    with whole_folder(out) as new:
        (new / "inner").mkdir()
        (new / "inner" / "one").write_text("1")
        assert not out.exists()
    with pytest.raises(RuntimeError), whole_folder(out) as new:
        (new / "two").write_text("2")
        raise RuntimeError
    assert [path.name for path in out.rglob("*")] == ["inner", "one"]
    with whole_folder(out) as new:
        (new / "two").write_text("2")
    assert [path.name for path in out.iterdir()] == ["two"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_the_old_folder_is_restored_if_the_new_one_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with whole_folder(out) as new:
        (new / "old").write_text("1")
    rename = Path.rename

    def fail_for_new(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError("no space")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(OSError, match="no space"), whole_folder(out) as new:
        (new / "new").write_text("2")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/old"]


def test_a_folder_left_by_a_killed_process_of_the_same_number_is_replaced(tmp_path: Path) -> None:
    left = tmp_path / f".out.partial-{os.getpid()}"
    left.mkdir()
    (left / "half").write_text("1")
    with whole_folder(tmp_path / "out") as new:
        assert not list(new.iterdir())

"""Atomic writes of files and folders, and their failure in words."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from arc_ds.errors import StorageError
from arc_ds.system.files import output, whole_file, whole_folder, write_whole
from tests.helpers.full_disk import limited_file_size

TENSOR = torch.zeros(5000)


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
    with whole_folder(out, overwrite=True) as new:
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
    with pytest.raises(StorageError, match="no space"), whole_folder(out, overwrite=True) as new:
        (new / "new").write_text("2")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/old"]


def test_partial_folders_of_killed_processes_are_deleted_and_others_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (f".out.partial-{os.getpid()}", ".out.partial-1", ".out.partial-2", ".out.old-1", ".other.partial-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("1")
    alive = os.open(tmp_path / ".out.partial-2", os.O_RDONLY)
    fcntl.flock(alive, fcntl.LOCK_SH)
    with whole_folder(tmp_path / "out") as new:
        assert not list(new.iterdir())
        assert {path.name for path in tmp_path.iterdir()} == {
            *(new.name, ".out.partial-2", ".out.old-1", ".other.partial-1")
        }
        other = os.open(new, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)
    os.close(alive)
    assert ".out.old-1 is an earlier" in caplog.text and "rename it to get it back" in caplog.text


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    message = "another process has written .*out meanwhile"
    with pytest.raises(StorageError, match=message), whole_folder(tmp_path / "out") as new:
        (new / "mine").write_text("1")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("2")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/theirs"]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch.save(TENSOR, path),
        lambda path: save_file({"a": TENSOR}, path),
        lambda path: path.write_bytes(bytes(20000)),
        lambda path: write_whole(path, bytes(20000)),
    ],
    ids=["torch", "safetensors", "file", "whole"],
)
def test_a_full_disk_is_one_error_in_words_for_any_writer(tmp_path: Path, write: Callable[[Path], None]) -> None:
    with limited_file_size(2000), pytest.raises(StorageError) as caught, output(tmp_path / "out", after=lambda: "A."):
        write(tmp_path / "out")
    words = str(caught.value)
    assert words.startswith(f"{tmp_path / 'out'} cannot be written: File too large (")
    assert "MiB are free on its disk). Free some space there and run the same command again" in words
    assert words.endswith("disk. A.")


def test_the_reason_is_found_before_the_disk_is_cleaned_up(tmp_path: Path) -> None:
    with (
        limited_file_size(2000),
        pytest.raises(StorageError, match="File too large"),
        whole_folder(tmp_path / "out") as new,
    ):
        save_file({"a": TENSOR}, new / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "Free some space"),
        (errno.EDQUOT, "Free some space"),
        (errno.EROFS, "Make it writable"),
        (errno.EACCES, "Make it writable"),
    ],
)
def test_the_remedy_is_that_of_the_reason(tmp_path: Path, number: int, remedy: str) -> None:
    with pytest.raises(StorageError, match=rf"{os.strerror(number)}.*{remedy}"), output(tmp_path / "a" / "b" / "out"):
        raise OSError(number, os.strerror(number), str(tmp_path / "a"))


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "no such file", "/elsewhere/input.json"),
        ConnectionResetError(errno.ECONNRESET, "reset"),
        RuntimeError("Connection closed by peer"),
    ],
)
def test_errors_of_inputs_and_of_other_ranks_are_not_taken_for_failed_writes(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, output(tmp_path / "out"):
        raise error
    assert caught.value is error

"""One process writes to a folder at a time. No way in which it ends leaves the folder locked."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest

from arc_ds.errors import ConfigError, DataError
from arc_ds.system import locks
from arc_ds.system.locks import LOCK_FILE, writing


def test_a_second_writer_is_told_who_the_first_is_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with writing(tmp_path / "out", "run"):
        before = sorted(tmp_path.rglob("*"))
        who = f"another run is writing .*link: process {os.getpid()} on {socket.gethostname()}. Stop it"
        with pytest.raises(ConfigError, match=who), writing(tmp_path / "link", "run", ConfigError, "Stop it."):
            pytest.fail("two writers")
        assert sorted(tmp_path.rglob("*")) == before
    with writing(tmp_path / "link", "run"):
        pass


def test_a_new_folder_stays_only_if_it_holds_something(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), writing(tmp_path / "above" / "out", "run"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old").mkdir()
    with writing(tmp_path / "old", "run"), writing(tmp_path / "new", "run"):
        (tmp_path / "new" / "result").touch()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["new", "new/result", "old"]


def test_a_killed_writer_leaves_no_lock_even_if_a_child_of_it_lives_on_for_a_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from arc_ds.system.locks import writing\n"
        "with writing(Path(sys.argv[1]), 'run'):\n"
        "    if os.fork() == 0:\n"
        "        while not (Path(sys.argv[1]) / 'sign').exists():\n"
        "            time.sleep(0.01)\n"
        "        os._exit(0)\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / LOCK_FILE).exists()

    def pause(seconds: float) -> None:
        (tmp_path / "sign").touch()
        time.sleep(seconds)

    # The moment lasts until the child has ended: the clock of the lock's patience stands still.
    monkeypatch.setattr(locks, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=pause))
    with writing(tmp_path, "run"):
        assert (tmp_path / "sign").exists(), "the child held the lock"
        assert str(os.getpid()) in (tmp_path / LOCK_FILE).read_text()


def test_a_lock_that_was_removed_before_it_was_held_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The former holder removes the file at its end. Two processes could otherwise hold two files of one name."""
    flock, calls = fcntl.flock, []

    def remove_first(file: IO[bytes], operation: int) -> None:
        calls.append(operation)
        if len(calls) == 1:
            (tmp_path / LOCK_FILE).unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with writing(tmp_path, "run"), pytest.raises(DataError), writing(tmp_path, "run"):
        pass


@pytest.mark.parametrize("when", ["before mkdir looks again", "before the lock is opened"])
def test_a_new_folder_that_its_holder_removes_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    folder, mkdir, calls = tmp_path / "new", os.mkdir, []

    def disturbed(path: Path, mode: int = 0o777) -> None:
        calls.append(path)
        if len(calls) > 1:
            mkdir(path, mode)
        elif when == "before mkdir looks again":
            raise FileExistsError(errno.EEXIST, "File exists", str(path))

    monkeypatch.setattr(os, "mkdir", disturbed)
    with writing(folder, "run"):
        assert (folder / LOCK_FILE).exists()
    assert calls == [folder] * 2


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _seconds: None))
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError), writing(tmp_path / "file", "run"):
        pytest.fail("no folder is there")


def test_a_file_system_without_locks_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_file: IO[bytes], operation: int) -> None:
        if operation != fcntl.LOCK_UN:
            raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(locks, "time", SimpleNamespace(monotonic=time.monotonic, sleep=pytest.fail))
    with writing(tmp_path, "run"):
        assert "has no locks" in caplog.text

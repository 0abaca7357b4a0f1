"""No output stream ends a command: other encodings, a closed stream, a full disk, a closed pipe."""

from __future__ import annotations

import argparse
import errno
import io
import os
import signal
import sys

import pytest

from arc_ds import cli
from arc_ds.launch.exit_codes import EXIT_FAILED

TEXT = "naïve – 東京"
repeats = 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    subparsers.add_parser("say").set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    print(TEXT * repeats)
    return 0


@pytest.fixture(autouse=True)
def command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "say", cli.Command(__name__, "print a text"))


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("utf-8", TEXT), ("latin-1", "naïve ? ??"), ("ascii", "na?ve ? ??"), ("cp1252", "naïve – ??")],
)
def test_characters_that_the_encoding_lacks_are_replaced(monkeypatch, encoding: str, shown: str, errors: str) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors=errors))
    assert cli.main(["say"]) == 0
    assert raw.getvalue().decode(encoding) == shown + "\n"


def test_an_error_handler_that_the_user_chose_is_kept(monkeypatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", errors="backslashreplace"))
    assert cli.main(["say"]) == 0
    assert raw.getvalue().startswith(rb"na\xefve")


def test_a_closed_output_discards_the_text(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert cli.main(["say"]) == 0
    sys.stdout.close()
    sys.stderr.close()


@pytest.mark.parametrize("num", [1, 100_000])
def test_a_full_disk_is_one_message(monkeypatch, capsys, num: int) -> None:
    monkeypatch.setattr(sys.modules[__name__], "repeats", num)
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["say"]) == EXIT_FAILED
    assert capsys.readouterr().err == "arc-ds say: standard output cannot be written: No space left on device\n"


def test_a_closed_pipe_ends_quietly(monkeypatch, capsys) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["say"]) == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""


def test_an_os_error_of_the_work_itself_is_not_blamed_on_the_output(monkeypatch) -> None:
    def fail(_: argparse.Namespace) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys.modules[__name__], "run", fail)
    with pytest.raises(OSError, match="No space left"):
        cli.main(["say"])

"""`arc-ds shards build`: every option reaches the build, and skipped records are printed."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest

from arc_ds.cli import main
from arc_ds.commands.shards import build as build_command
from arc_ds.commands.shards import convert as convert_command
from arc_ds.errors import DataError
from arc_ds.shards.building.converters import ConvertOptions
from arc_ds.shards.building.writer import build_shards
from tests.helpers.tiny_data import TEXT, write_lines, write_tiktoken


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return write_tiktoken(tmp_path / "tokenizer.model")


@pytest.fixture
def command(tmp_path: Path, tokenizer: Path) -> list[str]:
    """A build of one text to `my shards` that also caches its tokens."""
    (tmp_path / "a.txt").write_text(TEXT)
    words = ["shards", "build", str(tmp_path / "a.txt"), "--out", str(tmp_path / "my shards"), "--workers", "1"]
    return [*words, "--tokenizer", str(tokenizer), "--cache-tokens", str(tokenizer)]


def test_what_was_left_out_is_printed_by_reason(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = [{"body": TEXT * 30, "score": 2}, {"body": TEXT, "score": 0}, {"body": "A lamp.", "score": 1}, {}]
    source = write_lines(tmp_path / "a.jsonl", documents)
    command = ["shards", "build", str(source), "--out", str(tmp_path / "out"), "--tokenizer", str(tokenizer)]
    command += ["--text-field", "body", "--quality-field", "score", "--min-quality", "1", "--min-chars", "10"]
    assert main([*command, "--workers", "1"]) == 2
    assert "line 4: expected a number in the field 'score'" in capsys.readouterr().err
    assert main([*command, "--workers", "1", "--on-error", "skip", "--max-tokens", "300"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert " of 4 documents (1 cut)" in printed[0]
    assert printed[1:] == [
        "  left out: 1 with a field that is missing, of the wrong type or without tokens",
        "  left out: 1 of too few characters",
        "  left out: 1 of too low quality",
    ]


def test_a_tokenizer_to_cache_that_is_not_there_is_found_before_the_build(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, str(tmp_path / "typo.model")]) == 2
    assert "typo.model: no such file" in capsys.readouterr().err
    assert not (tmp_path / "my shards").exists()


def test_shards_whose_tokens_could_not_be_cached_are_said_to_be_whole(
    command: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = command[command.index("--out") + 1]

    def fail(*_: object, **__: object) -> None:
        raise DataError("a worker process died")

    monkeypatch.setattr(build_command, "cache_and_print", fail)
    assert main(command) == 2
    assert f"but their token caches are not. To resume: arc-ds shards tokenize '{out}'" in caplog.text
    assert main(["shards", "check", out]) == 0


def test_a_malformed_url_is_one_message_without_its_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "check", "https://me:secret@[bad/x?sig=secret"]) == 2
    error = capsys.readouterr().err
    assert "[bad/x… is not a valid URL" in error and "Correct the address" in error and "secret" not in error
    assert main(["shards", "check", "//[bad/x"]) == 2
    assert "found no manifest.json" in capsys.readouterr().err, "a local folder's name may have brackets"


def test_options_of_a_conversion_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []
    done = SimpleNamespace(records=0, skipped={})
    monkeypatch.setattr(convert_command, "convert_files", lambda *args, **_: given.append(args[3]) or done)
    options = ["--first-answer", "--evidence", "e", "--passage-words", "7", "--max-passages", "3"]
    assert main(["shards", "convert", "squad", "in.json", "--out", "out.jsonl", *options]) == 0
    assert given == [ConvertOptions(first_answer=True, evidence=Path("e"), passage_words=7, max_passages=3)]


def test_every_option_of_a_build_is_on_the_command_line_with_the_same_default(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    class Called(Exception):
        """Ends the command before the build starts."""

    def record(*_: object, **options: object) -> None:
        given.update(options)
        raise Called

    monkeypatch.setattr(build_command, "build_shards", record)
    with pytest.raises(Called):
        main(["shards", "build", "in", "--out", "out", "--tokenizer", "t"])
    expected = {
        name: parameter.default
        for name, parameter in inspect.signature(build_shards).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in ("workers", "progress")
    }
    assert {name: given[name] for name in expected} == expected
    assert given["workers"] >= 1

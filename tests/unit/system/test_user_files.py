"""Reading users' files: every fault is one error with the file, the reason and the remedy."""

from __future__ import annotations

import codecs
import io
import sys
from pathlib import Path

import pytest

from arc_ds.errors import ConfigError, DataError, WeightsError
from arc_ds.system.user_files import (
    check_downloaded,
    check_encodable,
    library_reads,
    read_user_bytes,
    read_user_json,
    read_user_stdin,
    read_user_text,
)

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4976698672\n"


def read(path: Path) -> object:
    return read_user_json(path, ConfigError, remedy="Fix it.")


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(codecs.BOM_UTF8 + '{"ü": 1}'.encode())
    assert read(tmp_path / "a") == {"ü": 1}
    assert read_user_text(tmp_path / "a", ConfigError, remedy="Fix it.") == '{"ü": 1}'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (POINTER.encode(), "git lfs pull"),
        ('{"a": 1}'.encode("utf-16"), "a is UTF-16, expected UTF-8.* iconv -f UTF-16 -t"),
        ('{"a": 1}'.encode("utf-16-le"), "a is UTF-16LE, .* iconv -f UTF-16LE -t"),
        ('{"a": 1}'.encode("utf-16-be"), "a is UTF-16BE, "),
        ('{"a": 1}'.encode("utf-32"), "a is UTF-32, "),
        ('{"a": 1}'.encode("utf-32-be"), "a is UTF-32BE, "),
        (b'{"a": "\xff"}', r"not UTF-8 .*0xff.* Fix it\."),
        (b'{"a":\n1,}', r"a:2: not valid JSON: .* Fix it\."),
        (b"[" * 100_000, r"not valid JSON: .* Fix it\."),
        (b"1" * 5000, r"not valid JSON: .* Fix it\."),
    ],
)
def test_a_faulty_file_is_one_error_with_its_remedy(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read(tmp_path / "a")


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=f"{path.name} cannot be read: {reason}"):
            read(path)


def test_only_pointers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("version 1")
    check_downloaded(tmp_path / "a", WeightsError)
    check_downloaded(tmp_path / "none", WeightsError)
    (tmp_path / "a").write_text(POINTER)
    with pytest.raises(WeightsError, match="pointer of Git LFS"):
        check_downloaded(tmp_path / "a", WeightsError)


class Panic(BaseException):
    """As Rust libraries raise it."""


@pytest.mark.parametrize(
    ("raised", "expected", "words"),
    [
        (
            Exception("odd"),
            ConfigError,
            r"file F cannot be read by pyyaml \d\S* \(odd\)\..*pip install -U pyyaml.*copy",
        ),
        (Panic("odd"), ConfigError, r"\(Panic: odd\)"),
        (KeyError("k"), ConfigError, r"\(KeyError: 'k'\)"),
        (WeightsError("ours"), WeightsError, "^ours$"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    ],
)
def test_whatever_a_library_raises_becomes_one_error(
    raised: BaseException, expected: type[BaseException], words: str
) -> None:
    with pytest.raises(expected, match=words), library_reads("pyyaml", "file F", ConfigError):
        raise raised


def test_the_head_of_a_file_is_read_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abcdef")
    assert read_user_bytes(tmp_path / "a", ConfigError, remedy="Fix it.", size=3) == b"abc"
    with pytest.raises(ConfigError, match=r"b cannot be read: No such file or directory\. Fix it\."):
        read_user_bytes(tmp_path / "b", ConfigError, remedy="Fix it.")


def test_standard_input_is_utf8_whatever_the_terminal_says(monkeypatch) -> None:
    for content in ("naïve".encode(), codecs.BOM_UTF8 + "naïve".encode()):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="latin-1"))
        assert read_user_stdin(DataError) == "naïve"
    for content, words in ((b"na\xefve", "standard input is not UTF-8"), ("a".encode("utf-16"), "input is UTF-16")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        with pytest.raises(DataError, match=words):
            read_user_stdin(DataError)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DataError, match="standard input is closed"):
        read_user_stdin(DataError)


def test_a_lone_surrogate_is_named_with_a_remedy_that_works() -> None:
    assert check_encodable("naïve 😀", "a") == "naïve 😀"
    with pytest.raises(DataError, match=r"the prompt holds characters .*'\\udcff' at character 2") as caught:
        check_encodable("ab\udcff", "the prompt")
    assert "text.encode('utf-8', 'replace').decode()" in str(caught.value)
    assert check_encodable("ab\udcff".encode("utf-8", "replace").decode(), "it") == "ab?"

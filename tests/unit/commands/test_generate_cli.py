"""`arc-ds compress` and `arc-ds generate` on a tiny model. A user's mistake gives one message and exit code 2.

`tests/distributed/test_export.py` covers `arc-ds export` of real shards.
"""

from __future__ import annotations

import dataclasses
import io
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arc_ds import ArcModel, Context
from arc_ds.cli import main
from arc_ds.errors import DataError
from arc_ds.export.formats import write_export
from arc_ds.inference.tags import parse_prompt
from arc_ds.launch.exit_codes import EXIT_USER_ERROR
from tests.helpers.full_disk import limited_file_size
from tests.helpers.tiny_export import tiny_trained, write_decoder
from tests.helpers.waiting import LIMIT_S

TEXTS = {"a.txt": "The wind came from the sea.", "b.txt": "A lamp."}
PROMPT = "Document: <context>The wind came from the sea.</context>\nSummary:"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports with both markers and without markers, a decoder, and texts."""
    folder = tmp_path_factory.mktemp("cli")
    write_export(tiny_trained(folder / "run"), folder / "export")
    write_export(tiny_trained(folder / "run", markers=()), folder / "bare")
    write_decoder(folder / "decoder")
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    return folder


def arguments(folders: Path, export: str = "export") -> list[str]:
    return ["--model", str(folders / export)]


def test_compress_writes_what_compress_gives(folders: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "vectors.safetensors"
    files = [str(folders / name) for name in TEXTS]
    assert main(["compress", *arguments(folders), "--out", str(out), *files]) == 0
    expected = ArcModel.from_checkpoint(folders / "export", decoders=[]).compress(list(TEXTS.values()))
    found = load_file(out)
    assert set(found) == {"context_0", "context_1"}
    assert all(torch.equal(found[f"context_{idx}"], vectors) for idx, vectors in enumerate(expected))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith(f"{files[0]}: ")
    assert lines[0].endswith(f"-> {expected[0].shape[0]} vectors of 48")


def test_compress_reads_standard_input_and_its_options(folders: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXTS["a.txt"].encode())))
    options = ["--pooling-factor", "2", "--marker", "none"]
    assert main(["compress", *arguments(folders), *options, "--out", str(tmp_path / "v.safetensors"), "-"]) == 0
    model = ArcModel.from_checkpoint(folders / "export", decoders=[], pooling_factor=2)
    (expected,) = model.compress([TEXTS["a.txt"]], marker=None)
    assert torch.equal(load_file(tmp_path / "v.safetensors")["context_0"], expected)


def test_a_full_disk_is_a_message_and_leaves_no_half_file(folders: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "v.safetensors"
    with limited_file_size(100):
        code = main(["compress", *arguments(folders), "--out", str(out), str(folders / "a.txt")])
    assert code == EXIT_USER_ERROR and f"{out} cannot be written: File too large" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("export", ["export", "bare"])
def test_generate_prints_what_generate_gives(folders: Path, capsys, export: str) -> None:
    options = ["--decoder", str(folders / "decoder"), "--max-new-tokens", "7"]
    assert main(["generate", *arguments(folders, export), *options, PROMPT]) == 0
    model = ArcModel.from_checkpoint(folders / export, decoders=[folders / "decoder"])
    context = Context("The wind came from the sea.", "cont" if export == "export" else None)
    (expected,) = model.generate([["Document: ", context, "\nSummary:"]], max_new_tokens=7)
    assert capsys.readouterr().out == expected + "\n"


def test_stops_end_the_text(folders: Path, capsys) -> None:
    def printed(*options: str) -> str:
        some = ["--decoder", str(folders / "decoder"), "--max-new-tokens", "9", *options]
        assert main(["generate", *arguments(folders), *some, PROMPT]) == 0
        return capsys.readouterr().out.removesuffix("\n")

    model = ArcModel.from_checkpoint(folders / "export", decoders=[folders / "decoder"])
    tokenizer = model.decoder_tokenizers[0]
    ids = model.generate_ids([model.segments(parse_prompt(PROMPT), 0)], max_new_tokens=9)[0]
    free = printed()
    stop = free[3:5]
    assert free == tokenizer.decode(ids) and printed("--stop", stop, "--stop", "#") == free[: free.index(stop)]
    assert printed("--stop-id", str(ids[4])) == tokenizer.decode(ids[: ids.index(ids[4])])


def test_compress_names_texts_beyond_those_of_training(folders: Path, tmp_path: Path, capsys, caplog) -> None:
    trained = dataclasses.replace(tiny_trained(tmp_path / "run"), max_context_tokens=8)
    write_export(trained, tmp_path / "export")
    files = [str(folders / name) for name in TEXTS]
    assert main(["compress", *arguments(tmp_path), "--out", str(tmp_path / "v.safetensors"), *files]) == 0
    long, short = capsys.readouterr().out.splitlines()
    assert long.endswith("(longer than in training)") and short.endswith("vectors of 48")
    assert caplog.text.count("trained on") == 1  # one warning gives the limit and the remedy


@pytest.mark.parametrize("content", ["﻿a\r\nb\rc", "a\nb\nc"])
def test_files_of_windows_are_the_same_text(folders: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "text").write_bytes(content.encode())
    assert main(["compress", *arguments(folders), "--out", str(tmp_path / "v"), str(tmp_path / "text")]) == 0
    (expected,) = ArcModel.from_checkpoint(folders / "export", decoders=[]).compress(["a\nb\nc"])
    assert torch.equal(load_file(tmp_path / "v")["context_0"], expected)


def test_drawing_follows_the_seed(folders: Path, capsys) -> None:
    def printed(seed: str) -> str:
        drawing = ["--temperature", "2", "--top-p", "0.95", "--seed", seed, "--max-new-tokens", "12"]
        options = ["--decoder", str(folders / "decoder"), *drawing]
        assert main(["generate", *arguments(folders), *options, PROMPT]) == 0
        return capsys.readouterr().out

    assert printed("1") == printed("1") != printed("2")


def test_a_prompt_is_cut_at_its_tags() -> None:
    assert parse_prompt("plain") == ["plain"]
    assert parse_prompt("a<context>b\nc</context>d<context>e</context>") == ["a", Context("b\nc"), "d", Context("e")]
    assert parse_prompt("<context>b</context>", None) == [Context("b", None)]


def test_an_argument_in_utf8_is_read_in_every_locale(folders: Path, capsys) -> None:
    printed = []
    for prompt in ("naïve", "naïve".encode().decode("ascii", "surrogateescape"), "native"):
        options = ["--decoder", str(folders / "decoder"), "--max-new-tokens", "7"]
        assert main(["generate", *arguments(folders), *options, prompt]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]


@pytest.mark.parametrize("prompt", ["a <context>b", "a</context>", "<context>a<context>b</context>c</context>"])
def test_a_tag_without_its_other_half_is_not_read_as_text(prompt: str) -> None:
    with pytest.raises(DataError, match="unmatched"):
        parse_prompt(prompt)


def test_the_time_to_read_tags_grows_with_their_number_only() -> None:
    """A search for the end of each context took the square: a quarter of an hour for these tags."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(int(LIMIT_S))
    try:
        for prompt in ("<context>" * 400_000, "</context>" * 400_000):
            with pytest.raises(DataError, match="unmatched"):
                parse_prompt(prompt)
        assert len(parse_prompt("<context>a</context>" * 200_000)) == 200_000
    finally:
        signal.alarm(0)


def _too_long(*_: object) -> None:
    pytest.fail("the time grows with the square")


EXPORT = ["--model", "export", "--decoder", "decoder"]
MISTAKES = [
    (["--model", "gone", "--decoder", "decoder", "x"], "is neither an export"),
    (["--model", "export", "--decoder", "gone", "x"], "does not exist"),
    ([*EXPORT, "--decoder-idx", "1", "x"], "decoder 1 was requested"),
    ([*EXPORT, "--pooling-factor", "0", "x"], "pooling_factor is 0"),
    ([*EXPORT, "--memory-tokens", "3", "x"], "memory_tokens is 3, but this encoder pools"),
    ([*EXPORT, "--temperature", "-1", "x"], "temperature is -1.0"),
    ([*EXPORT, "--top-p", "inf", "x"], "top_p inf"),
    ([*EXPORT, "--seed", str(2**64), "x"], "seed is 18446744073709551616"),
    ([*EXPORT, "--max-new-tokens", "-1", "x"], "max_new_tokens is -1"),
    ([*EXPORT, "--stop-id", "350", "x"], "a stop id is 350"),
    ([*EXPORT, "--stop", "", "x"], "texts that are not empty"),
    ([*EXPORT, "caf\udce9"], "the prompt holds characters that UTF-8 cannot encode"),
    ([*EXPORT, "a<context>"], "unmatched"),
    ([*EXPORT, "<context></context>"], "empty <context>"),
    (["--model", "bare", "--decoder", "decoder", "--marker", "rec", "<context>a</context>"], "has no marker"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_one_message_and_exit_code_2(folders: Path, monkeypatch, capsys, options, message) -> None:
    monkeypatch.chdir(folders)
    assert main(["generate", *options]) == EXIT_USER_ERROR
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("arc-ds generate: ") and message in captured.err
    assert captured.err.count("\n") == 1


def test_compress_overwrites_nothing_and_names_what_it_cannot_read(folders: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "there"
    out.write_text("mine")
    (tmp_path / "binary").write_bytes(b"\xff\x00")
    (tmp_path / "empty").write_text("")
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    wrong = [(out, folders / "a.txt", "already exists"), (tmp_path / "o", tmp_path / "binary", "is not UTF-8")]
    wrong += [(tmp_path / "o", tmp_path / "gone", "gone cannot be read"), (tmp_path / "o", tmp_path / "empty", "empty")]
    wrong += [(tmp_path / "o", tmp_path / "pointer", "git lfs pull")]
    for target, text, message in wrong:
        assert main(["compress", *arguments(folders), "--out", str(target), str(text)]) == EXIT_USER_ERROR
        assert message in capsys.readouterr().err
    assert out.read_text() == "mine" and not (tmp_path / "o").exists()

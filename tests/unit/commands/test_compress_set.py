"""`arc-ds compress` of folders and JSONL files: a set of shards with an index."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from arc_ds import ArcModel
from arc_ds.cli import main
from arc_ds.export.formats import write_export
from arc_ds.inference.vectors import read_vectors
from arc_ds.launch.exit_codes import EXIT_USER_ERROR
from tests.helpers.full_disk import limited_file_size
from tests.helpers.tiny_data import write_lines
from tests.helpers.tiny_export import tiny_trained

LONG = "The wind came from the sea and the keeper lit the lamp. "


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    write_export(tiny_trained(folder / "run"), folder / "export")
    write_export(tiny_trained(folder / "run", seed=1), folder / "other")
    return folder / "export"


def compress(export: Path, out: Path, *more: str | Path) -> int:
    return main(["compress", "--model", str(export), "--out", str(out), *map(str, more)])


def records(num: int) -> list[dict[str, Any]]:
    return [{"id": f"r{n}", "text": f"{LONG * (1 + n % 3)}{n}"} for n in range(num)]


def test_a_set_holds_what_compress_gives(export: Path, tmp_path: Path, capsys) -> None:
    docs = tmp_path / "docs"
    (docs / "sub").mkdir(parents=True)
    (docs / ".hidden").mkdir()
    texts = {"a.txt": "A lamp.", "sub/b.md": LONG, "c.rst": "left out", ".hidden/d.txt": "left out"}
    for name, text in texts.items():
        (docs / name).write_text(text)
    lines = write_lines(tmp_path / "x.jsonl", [{"id": 7, "body": LONG * 2}, "", {"body": "No id.", "text": "not this"}])
    options = ("--text-field", "body", "--batch-tokens", "30", "--shard-mb", "0.002")
    assert compress(export, tmp_path / "out", *options, docs, lines) == 0
    found = read_vectors(tmp_path / "out")
    expected = {f"{docs}/a.txt": "A lamp.", f"{docs}/sub/b.md": LONG, "7": LONG * 2, f"{lines}:3": "No id."}
    model = ArcModel.from_checkpoint(export, decoders=[])
    assert list(found) == list(expected) and len(found) == 4
    for (key, text), vectors in zip(expected.items(), model.compress(list(expected.values())), strict=True):
        torch.testing.assert_close(found[key], vectors)
        assert found.entries[key].tokens == len(model.encoder_tokenizer.encode(text))  # type: ignore[union-attr]
    assert len({entry.shard for entry in found.entries.values()}) > 1
    assert found.settings.hidden_size == 48 and found.settings.marker == "cont"
    num_tokens = sum(entry.tokens for entry in found.entries.values())
    assert f"4 texts, {num_tokens} tokens -> " in capsys.readouterr().out


def test_texts_that_are_left_out_are_counted_with_a_remedy(export: Path, tmp_path: Path, caplog) -> None:
    given = [{"id": "a", "text": LONG}, {"id": "a", "text": "again"}, {"id": "b", "text": " \n"}, "{", {"id": "c"}]
    given += [{"id": 1.5, "text": "x"}, {"text": "\ud83d"}]
    lines = write_lines(tmp_path / "x.jsonl", given)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    assert compress(export, tmp_path / "out", "--on-error", "skip", lines, tmp_path / "binary.txt") == 0
    assert list(read_vectors(tmp_path / "out")) == ["a"]
    assert any(line.startswith(f"left out: {tmp_path}/binary.txt is ") for line in caplog.messages)
    for number, reason in ((4, "JSON"), (5, "'text'"), (6, "'id'"), (7, "UTF-8 cannot encode")):
        assert any(
            line.startswith(f"left out: {lines}, line {number}: ") and reason in line for line in caplog.messages
        )
    assert "1 empty texts were left out: give them text" in caplog.text
    assert "1 texts were left out because an earlier text has the same id: give each" in caplog.text


def test_a_line_that_cannot_be_used_stops_by_default(export: Path, tmp_path: Path, capsys) -> None:
    lines = write_lines(tmp_path / "x.jsonl", [*({"text": f"lamp {n}"} for n in range(280)), {"txt": "a"}])
    assert compress(export, tmp_path / "out", "--batch-tokens", "200", lines) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert "x.jsonl, line 281: " in error and "'text'" in error and "--on-error skip" in error
    assert len(read_vectors(tmp_path / "out")) > 200  # earlier vectors are kept


def test_a_set_takes_more_texts_of_the_same_model_only(export: Path, tmp_path: Path, capsys) -> None:
    first, second = write_lines(tmp_path / "1.jsonl", records(2)), write_lines(tmp_path / "2.jsonl", records(3))
    out = tmp_path / "out"
    assert compress(export, out, first) == 0
    assert compress(export, out, second) == 0 and len(read_vectors(out)) == 3
    capsys.readouterr()
    others = [(export.with_name("other"), ()), (export, ("--marker", "rec")), (export, ("--dtype", "bfloat16"))]
    for model, options in others:
        assert compress(model, out, *options, second) == EXIT_USER_ERROR
        assert "holds vectors of another model or of other options" in capsys.readouterr().err
    assert len(read_vectors(out)) == 3


def test_mistakes_name_their_remedy(export: Path, tmp_path: Path, capsys) -> None:
    lines = write_lines(tmp_path / "x.jsonl", records(1))
    for folder in ("full", "none"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    mistakes = [
        ((tmp_path / "out.safetensors", lines), "Give a folder"),
        ((tmp_path / "full", lines), "is not empty and is no set of vectors (it holds mine)"),
        ((tmp_path / "out", tmp_path / "none"), "holds no files that end in .txt or .md"),
        ((tmp_path / "out", tmp_path / "gone.jsonl"), "gone.jsonl does not exist"),
        ((tmp_path / "out", "--decoder-idx", "3", lines), "decoder 3 was requested"),
        ((tmp_path / "out", "--batch-tokens", "0", lines), "must be positive"),
        ((tmp_path / "out", "--shard-mb", "nan", lines), "must be positive"),
        (("/dev/null", lines), "--out is /dev/null; folders and JSONL files become a folder of shards. Give a folder"),
    ]
    for arguments, message in mistakes:
        assert compress(export, *arguments) == EXIT_USER_ERROR
        assert message in capsys.readouterr().err
    assert (tmp_path / "full" / "mine").read_text() == "mine" and not (tmp_path / "out").exists()


def test_a_full_disk_keeps_whole_shards(export: Path, tmp_path: Path, capsys) -> None:
    lines, out = write_lines(tmp_path / "x.jsonl", [*records(2), {"id": "big", "text": LONG * 40}]), tmp_path / "out"
    options = ("--batch-tokens", "1", "--shard-mb", "0.0001")
    with limited_file_size(20_000):
        assert compress(export, out, *options, lines) == EXIT_USER_ERROR
    assert "continues after its whole shards" in capsys.readouterr().err
    assert list(read_vectors(out)) == ["r0", "r1"]
    assert compress(export, out, *options, lines) == 0 and list(read_vectors(out)) == ["r0", "r1", "big"]


def test_a_damaged_set_is_named(export: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--batch-tokens", "1", "--shard-mb", "0.0001")
    assert compress(export, out, *options, write_lines(tmp_path / "x.jsonl", records(3))) == 0
    shard = out / "vectors-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9])
    found = read_vectors(out)
    with pytest.raises(Exception, match=r"vectors-00001.safetensors is damaged"):
        found["r1"]
    shard.unlink()
    with pytest.raises(Exception, match=r"vectors-00001.safetensors is missing, but later shards exist"):
        read_vectors(out)
    with pytest.raises(Exception, match="arc-ds compress"):
        read_vectors(tmp_path)


def test_texts_are_tokenized_once(export: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text(LONG)
    calls = []
    model = ArcModel.from_checkpoint(export, decoders=[])
    tokenizer = type(model.encoder_tokenizer)
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda self, text: calls.append(text) or encode(self, text))
    assert compress(export, tmp_path / "v.safetensors", tmp_path / "a.txt") == 0
    assert calls == [LONG]


def test_standard_input_is_one_text_of_a_set(export: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(LONG.encode())))
    (tmp_path / "out").mkdir()
    assert compress(export, tmp_path / "out", "-") == 0
    assert list(read_vectors(tmp_path / "out")) == ["-"]


def test_an_edited_text_is_a_fault_and_not_an_old_vector(export: Path, tmp_path: Path, capsys, caplog) -> None:
    out = tmp_path / "out"
    lines = write_lines(tmp_path / "x.jsonl", [*records(2), {"id": "r0", "text": "a duplicate"}])
    assert compress(export, out, lines) == 0 and compress(export, out, lines) == 0
    edited = write_lines(tmp_path / "x.jsonl", [{"id": "r0", "text": "Edited."}, {"id": "new", "text": "A lamp."}])
    assert compress(export, out, edited) == EXIT_USER_ERROR
    error = capsys.readouterr().err
    assert "the text r0 has changed since the set got its vectors" in error and "another folder" in error
    assert compress(export, tmp_path / "other", edited) == 0  # the remedy
    assert compress(export, out, "--on-error", "skip", edited) == 0
    assert list(read_vectors(out)) == ["r0", "r1", "new"] and "left out: the text r0 has changed" in caplog.text


def test_a_run_that_was_killed_before_its_first_file_can_be_repeated(export: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".vectors.json.partial-1").write_text("{")
    assert compress(export, out, write_lines(tmp_path / "x.jsonl", records(1))) == 0
    assert list(read_vectors(out)) == ["r0"] and not list(out.glob(".*"))

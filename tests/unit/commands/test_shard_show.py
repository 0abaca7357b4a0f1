"""Showing samples: texts are complete, the ends of groups and tokens are marked, and targets are distinguished."""

from __future__ import annotations

import itertools
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arc_ds.batch.groups import GroupRule
from arc_ds.batch.segments import Sample, Segment
from arc_ds.cli import main
from arc_ds.commands.shards.sample_view import SampleView
from arc_ds.data.tasks import Example, TaskCounts
from arc_ds.shards.building.writer import build_shards
from arc_ds.tokenizers import Tokenizer, load_tokenizer
from arc_ds.tokenizers.base import spell
from tests.helpers.tiny_data import numbered_texts, write_json_tokenizer, write_lines, write_shards, write_tiktoken


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiktoken(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_json_tokenizer(tmp_path_factory.mktemp("json")))


@given(text=st.text(alphabet="ab .é北🚲", max_size=40), data=st.data())
def test_pieces_spelled_together_are_the_text(tokenizer: Tokenizer, text: str, data: st.DataObject) -> None:
    ids = tokenizer.encode(text)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=9)))
    bounds = [0, *cuts, len(ids)]
    pieces = spell(tokenizer, [ids[a:b] for a, b in itertools.pairwise(bounds)])
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


def sample_of(tokenizer: Tokenizer, other: Tokenizer) -> Example:
    segments = (
        Segment.text([other.bos_id, *other.encode("Wind. ")]),
        Segment.context(tokenizer.encode("the sea 🚲 lamp"), "cont"),
        Segment.text(other.encode("Of")),
        Segment.text([*other.encode(" stone"), other.eos_id or 0], in_loss=True),
    )
    sample, counts = Sample("continuation", segments), TaskCounts(cut_contexts=2)
    contexts = ("the sea 🚲 lamp",)
    return Example(sample=sample, contexts=contexts, passages=(), counts=counts, closed=tuple, open=tuple)


def test_contexts_groups_targets_and_special_tokens_are_told_apart(tokenizer: Tokenizer, other: Tokenizer) -> None:
    view = SampleView(tokenizer, other, groups=GroupRule("factor", 3))
    head, body, _ = view.render(sample_of(tokenizer, other), "record 3").split("\n")
    num_context = len(tokenizer.encode("the sea 🚲 lamp"))
    assert head.startswith("── record 3: continuation, ") and head.endswith("2 cut contexts ──")
    assert f"{num_context} encoder tokens" in head
    assert body.count("│") == -(-num_context // 3) - 1
    assert body.replace("│", "") == "<s>Wind. ⟦the sea 🚲 lamp<cont>⟧Of__ stone____</s>__"


def test_tokens_of_both_tokenizers_are_shown_where_asked(tokenizer: Tokenizer, other: Tokenizer) -> None:
    view = SampleView(tokenizer, other, tokens=True)
    _, body, reading, _ = view.render(sample_of(tokenizer, other), "record 3").split("\n")
    (context,) = re.findall("⟦(.*)<cont>⟧", body)
    assert context.count("·") == len(tokenizer.encode("the sea 🚲 lamp")) - 1
    num_tokens = len(other.encode("the sea 🚲 lamp"))
    assert reading.startswith(f"context 1 in {num_tokens} decoder tokens: ") and reading.count("·") == num_tokens - 1
    assert reading.split(": ")[1].replace("·", "") == "⟦the sea 🚲 lamp⟧"


def test_colours_are_closed_and_hide_nothing(tokenizer: Tokenizer, other: Tokenizer) -> None:
    example = sample_of(tokenizer, other)
    coloured = SampleView(tokenizer, other, colour=True).render(example, "record 3")
    plain = SampleView(tokenizer, other).render(example, "record 3")
    assert "\x1b[36mthe sea" in coloured and "\x1b[4m stone\x1b[0m" in coloured
    assert len(re.findall(r"\x1b\[0m", coloured)) == len(re.findall(r"\x1b\[[1-9]", coloured))
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == re.sub("[⟦⟧]|__", "", plain)


def test_show_prints_samples_of_every_task(
    tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "texts", tokenizer_path, numbered_texts(9))
    questions = [
        {"passages": [f"The lamp of tower {idx} is lit."], "question": f"Which tower {idx}?", "answer": f"Tower {idx}"}
        for idx in range(5)
    ]
    source = write_lines(tmp_path / "q.jsonl", questions)
    build_shards([source], tmp_path / "questions", tokenizer_path, kind="fine_tuning")

    def show(folder: str, *options: str, code: int = 0) -> str:
        words = ["--tokenizer", str(tokenizer_path), "--num", "2", "--first", "3", *options]
        assert main(["shards", "show", str(tmp_path / folder), *words]) == code
        printed = capsys.readouterr()
        return printed.out + printed.err

    text = show("texts", "--task", "reconstruction", "--max-context", "3")
    assert "record 3: reconstruction, 3 encoder tokens" in text and "record 4: reconstruction" in text
    out = show("questions", "--in-context-examples", "2")
    assert out.count("Document: ⟦") == 2 * 3
    assert "__ Tower 3" in out
    assert len(set(re.findall(r"Which tower (\d)", out.split("── record 4")[0]))) == 3
    no_text = "record 3 gives no sample: expected a string in the field 'text'"
    assert no_text in show("questions", "--task", "reconstruction")
    assert "<|im_start|>" in show("texts", "--chat-template", "chatml", code=2)


def test_a_reader_that_has_enough_ends_the_command_in_silence(tmp_path: Path, tokenizer_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", tokenizer_path, numbered_texts(300))  # more than the capacity of a pipe
    command = [sys.executable, "-m", "arc_ds.cli", "shards", "show", str(shards.folder)]
    words = ["--tokenizer", str(tokenizer_path), "--decoder-tokenizer", str(tokenizer_path), "--num", "300"]
    with subprocess.Popen([*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as show:
        assert show.stdout.readline()
        show.stdout.close()
        assert show.stderr.read() == b""
    assert show.returncode == 128 + signal.SIGPIPE

"""`arc-ds generate --input --output`: prompts and questions of a JSONL file."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from arc_ds import ArcModel, Context
from arc_ds.cli import main
from arc_ds.data.order.randomness import random_words
from arc_ds.data.tasks.chat import PLAIN, read_layout
from arc_ds.data.tasks.example import ExampleSpec
from arc_ds.data.tasks.kinds.few_shot import few_shot_example
from arc_ds.data.tasks.limits import TaskLimits
from arc_ds.export.formats import write_export
from arc_ds.launch.exit_codes import EXIT_USER_ERROR
from tests.helpers.tiny_data import write_lines
from tests.helpers.tiny_export import tiny_trained

SEA, LAMP = "The wind came from the sea.", "A lamp."
PROMPT = {"prompt": f"Document: <context>{SEA}</context>\nSummary:"}
QUESTION = {"id": "q", "question": "Where did the wind come from?", "documents": [SEA, LAMP]}


def generate(folder: Path, given: Path, out: Path, *options: str) -> int:
    files = ["--model", str(folder / "export"), "--decoder", str(folder / "decoder")]
    lines = ["--input", str(given), "--output", str(out), "--max-new-tokens", "6"]
    return main(["generate", *files, *lines, *options])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_and_questions_give_what_generate_gives(folder: Path, model: ArcModel, tmp_path: Path, capsys) -> None:
    given = write_lines(tmp_path / "in.jsonl", [PROMPT, "", QUESTION, {"id": 9, "prompt": "The keeper"}])
    assert generate(folder, given, tmp_path / "out.jsonl", "--batch-size", "2") == 0
    prompts = [
        ["Document: ", Context(SEA), "\nSummary:"],
        ["Document: ", Context(f"{SEA}\n{LAMP}"), "\nQuestion: Where did the wind come from?\nAnswer:"],
        ["The keeper"],
    ]
    texts = [model.generate([prompt], max_new_tokens=6)[0] for prompt in prompts]
    texts[1] = texts[1].partition("\n\n")[0]
    digests = [hashlib.sha256(line).hexdigest()[:16] for line in given.read_bytes().splitlines() if line]
    expected = [
        {"id": key, "text": text, "input_digest": digest}
        for key, text, digest in zip((1, "q", 9), texts, digests, strict=True)
    ]
    assert read(tmp_path / "out.jsonl") == expected
    assert len(set(texts)) == 3 and all(texts)
    assert capsys.readouterr().out.endswith("out.jsonl: 3 texts; 0 were there already; 0 left out\n")


@pytest.mark.parametrize("template", ["none", "llama2"])
@pytest.mark.parametrize("instruction", [None, "Answer in French: {question}"])
def test_a_question_is_written_as_in_training(
    folder: Path, model: ArcModel, tmp_path: Path, monkeypatch, template, instruction
) -> None:
    encoder, decoder = model.encoder_tokenizer, model.decoder_tokenizers[0]
    layout = PLAIN if template == "none" else read_layout(template, decoder, folder / "decoder")
    seed = next(seed for seed in range(99) if int(random_words(2, seed, "few-shot")[0]) % 2)  # takes both passages
    spec = ExampleSpec("few_shot", seed, encoder, decoder, TaskLimits(max_passages=2), layout)
    record = {"question": QUESTION["question"], "passages": [SEA, LAMP], "answer": "the sea"}
    record |= {} if instruction is None else {"instruction": instruction}
    segments = few_shot_example([record], spec).sample.segments
    first_target = next(place for place, segment in enumerate(segments) if segment.in_loss)
    seen: list[Any] = []
    monkeypatch.setattr(ArcModel, "generate", lambda self, prompts, **_: seen.extend(prompts) or ["x"] * len(prompts))
    given = write_lines(tmp_path / "in.jsonl", [{**record, "id": "q"}])
    assert generate(folder, given, tmp_path / "out.jsonl", "--chat-template", template) == 0
    assert [tuple(prompt) for prompt in seen] == [segments[:first_target]]
    if template != "none":
        write_export(tiny_trained(tmp_path / "run", chat_templates=(template,)), tmp_path / "export")
        (tmp_path / "decoder").symlink_to(folder / "decoder")
        assert generate(tmp_path, given, tmp_path / "recorded.jsonl") == 0
        assert tuple(seen[1]) == segments[:first_target], "the template of training is the default"
        assert generate(tmp_path, given, tmp_path / "other.jsonl", "--chat-template", "none") == 0
        assert tuple(seen[2]) != segments[:first_target]


def test_a_killed_run_continues_in_order(folder: Path, tmp_path: Path, capsys) -> None:
    given = write_lines(tmp_path / "in.jsonl", [{"prompt": f"{word} of the sea"} for word in ("a", "b", "c", "d", "e")])
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert generate(folder, given, whole) == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    for kept in (lines[2][:-3], lines[2][:4], lines[2][:-1]):  # the last one lacks only its line end
        out.write_bytes(b"".join(lines[:2]) + kept)
        assert generate(folder, given, out) == 0
        assert out.read_bytes() == whole.read_bytes()
    assert generate(folder, given, out) == 0 and out.read_bytes() == whole.read_bytes()
    assert capsys.readouterr().out.count("out.jsonl: 3 texts; 2 were there already") == 2


def test_a_record_that_has_changed_is_a_fault_and_not_an_old_text(folder: Path, tmp_path: Path, capsys) -> None:
    out, lines = tmp_path / "out.jsonl", [{"prompt": "The sea"}, {"prompt": "A lamp"}]
    assert generate(folder, write_lines(tmp_path / "in.jsonl", lines), out) == 0
    before = out.read_bytes()
    given = write_lines(tmp_path / "in.jsonl", [{"prompt": "A new first line"}, *lines])
    assert generate(folder, given, out) == EXIT_USER_ERROR and out.read_bytes() == before
    assert "in.jsonl, line 1: the record 1 has changed since the output got its text" in capsys.readouterr().err
    assert generate(folder, given, tmp_path / "other.jsonl") == 0  # the remedy


@pytest.mark.parametrize(
    "content", [b"my notes", b'{"id": [1], "text": "x"}\n', b'[{"id": 1}]', b'"text id"', b"\xff\n"]
)
def test_a_file_of_the_user_is_never_changed(content: bytes, folder: Path, tmp_path: Path, capsys) -> None:
    given, mine = write_lines(tmp_path / "in.jsonl", [PROMPT]), tmp_path / "mine"
    mine.write_bytes(content)
    assert generate(folder, given, mine) == EXIT_USER_ERROR
    assert mine.read_bytes() == content
    assert "mine, line 1 is no output of `arc-ds generate`. Give another file" in capsys.readouterr().err


def test_devices_and_empty_files_are_not_removed(folder: Path, tmp_path: Path, capsys) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    given = write_lines(tmp_path / "in.jsonl", [{"id": 1}])
    assert generate(folder, given, tmp_path / "pipe") == EXIT_USER_ERROR
    assert "pipe, which is not a file that can be continued" in capsys.readouterr().err
    assert generate(folder, given, tmp_path / "empty") == EXIT_USER_ERROR
    assert (tmp_path / "pipe").exists() and (tmp_path / "empty").exists()


def test_the_blank_line_ends_answers_and_not_prompts(folder: Path, tmp_path: Path, monkeypatch) -> None:
    calls: list[Any] = []

    def generate_and_note(self: ArcModel, prompts: Any, **options: Any) -> list[str]:
        calls.append((len(prompts), options["stop"]))
        return ["x"] * len(prompts)

    monkeypatch.setattr(ArcModel, "generate", generate_and_note)
    given = write_lines(tmp_path / "in.jsonl", [QUESTION, PROMPT, {"prompt": "A lamp"}])
    assert generate(folder, given, tmp_path / "out.jsonl", "--stop", "end") == 0
    assert calls[1:] == [(1, ["end", "\n\n"]), (2, ["end"])]  # the first call checks the options


BAD = [
    ("{", "JSON"),
    ({"id": 1, "text": "x"}, "expected `prompt`, or `question` and `documents`"),
    ({"id": 2, "question": "Why?", "documents": []}, "in the field 'documents'"),
    ({"id": 3, "question": "Why?", "documents": ["a"], "passage": "b"}, "expected `prompt`, or"),
    ({"id": 4, "prompt": "a <context>b"}, "unmatched <context>"),
    ({"id": [], "prompt": "a"}, "in the field 'id', got list"),
    ({"id": "ok", "prompt": "again"}, "an earlier record has the id 'ok' too"),
]


def test_lines_that_cannot_be_used_are_counted_with_their_numbers(folder: Path, tmp_path: Path, caplog, capsys) -> None:
    good = {"id": "ok", "prompt": "The sea"}
    given = write_lines(tmp_path / "in.jsonl", [good, *(record for record, _ in BAD), {"id": "last", **PROMPT}])
    assert generate(folder, given, tmp_path / "out.jsonl", "--on-error", "skip") == 0
    assert [record["id"] for record in read(tmp_path / "out.jsonl")] == ["ok", "last"]
    for number, (_, message) in enumerate(BAD, 2):
        assert any(
            line.startswith(f"left out: {given}, line {number}: ") and message in line for line in caplog.messages
        )
    assert f"{len(BAD)} left out" in capsys.readouterr().out


def test_a_record_that_the_model_refuses_leaves_its_batch_whole(
    folder: Path, tmp_path: Path, monkeypatch, caplog
) -> None:
    refused = "prompt holds this"
    generate_of_model = ArcModel.generate

    def generate_or_refuse(self, prompts, **options):
        from arc_ds.errors import DataError

        if any(refused in str(prompt) for prompt in prompts):
            raise DataError("it cannot be read.")
        return generate_of_model(self, prompts, **options)

    monkeypatch.setattr(ArcModel, "generate", generate_or_refuse)
    given = write_lines(tmp_path / "in.jsonl", [{"prompt": "The sea"}, {"prompt": refused}, {"prompt": "A lamp"}])
    assert generate(folder, given, tmp_path / "out.jsonl", "--on-error", "skip") == 0
    assert [record["id"] for record in read(tmp_path / "out.jsonl")] == [1, 3]
    assert caplog.messages == [f"left out: {given}, line 2: it cannot be read."]


def test_mistakes_name_their_remedy(folder: Path, tmp_path: Path, capsys) -> None:
    given, other = write_lines(tmp_path / "in.jsonl", [PROMPT, {}]), write_lines(tmp_path / "mine.jsonl", [{"a": 1}])
    out = tmp_path / "out.jsonl"
    (tmp_path / "earlier.jsonl").touch()
    mistakes = [
        ((given, out), "in.jsonl, line 2: expected `prompt`"),
        ((given, other), "mine.jsonl, line 1 is no output of `arc-ds generate`. Give another file"),
        ((given, given), "--output is the input file"),
        ((tmp_path / "gone.jsonl", out), "gone.jsonl does not exist"),
        ((tmp_path / "gone.jsonl", tmp_path / "earlier.jsonl"), "gone.jsonl does not exist"),
        ((given, out, "a prompt"), "give either a prompt, or --input and --output"),
        ((given, out, "--batch-size", "0"), "--batch-size is 0"),
        ((given, out, "--decoder-idx", "2"), "decoder 2 was requested"),
        ((given, out, "--chat-template", "chatml"), "this tokenizer lacks"),
    ]
    for arguments, message in mistakes:
        out.unlink(missing_ok=True)
        assert generate(folder, *arguments) == EXIT_USER_ERROR
        assert message in capsys.readouterr().err
        assert not out.exists() or len(read(out)) == 1  # answers before a bad line are kept
    assert read(other) == [{"a": 1}] and len(read(given)) == 2


def test_two_runs_do_not_write_one_file(folder: Path, tmp_path: Path, capsys) -> None:
    given, out = write_lines(tmp_path / "in.jsonl", [PROMPT]), tmp_path / "out.jsonl"
    with out.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert generate(folder, given, out) == EXIT_USER_ERROR
    assert "another generation is writing" in capsys.readouterr().err

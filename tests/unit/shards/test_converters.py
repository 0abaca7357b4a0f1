"""Converters: every question of the original files becomes a record that a build accepts, or is counted by reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arc_ds.cli import main
from arc_ds.errors import DataError
from arc_ds.shards.building.converters import ConvertOptions, convert_files
from arc_ds.shards.building.writer import build_shards
from arc_ds.shards.reader import ShardSet
from tests.helpers.tiny_data import write_tiktoken

PASSAGE = "The lamp was lit in 1811. It burned whale oil, then gas."
QUESTIONS = [
    {
        "id": "q1",
        "question": " What burned? ",
        "answers": [{"text": text} for text in ("whale oil", "gas", "whale oil ")],
    },
    {"id": "q2", "question": "Who lit it?", "answers": [], "is_impossible": True},
]
SQUAD = {"version": "v2.0", "data": [{"title": "Lamp", "paragraphs": [{"context": PASSAGE, "qas": QUESTIONS}]}]}


def drop_answer(number: str = "", spans: tuple[str, ...] = (), **date: str) -> dict[str, Any]:
    return {"number": number, "date": {"day": "", "month": "", "year": ""} | date, "spans": spans}


PAIRS = [
    {"query_id": "a", "question": "How many fuels?", "answer": drop_answer("2")},
    {
        "query_id": "b",
        "question": "Which fuels?",
        "answer": drop_answer(spans=("whale oil", "gas")),
        "validated_answers": [drop_answer(spans=("oil and gas",))],
    },
    {"query_id": "c", "question": "When was it lit?", "answer": drop_answer(month="May", year="1811")},
    {"query_id": "d", "question": "Why?", "answer": drop_answer()},
]
DROP = {"sea_1": {"passage": PASSAGE, "qa_pairs": PAIRS}}
LAMP = [{"Filename": "Lamp.txt", "Title": "Lamp"}]
TRIVIA = {
    "Data": [
        {
            "QuestionId": "tc_1",
            "Question": "Which oil did the lamp burn?",
            "Answer": {"Value": "whale oil", "Aliases": ["oil of whales", "whale oil"]},
            "EntityPages": LAMP,
            "SearchResults": [{"Filename": "7/7_1.txt", "Rank": 0}],
        },
        {"QuestionId": "tc_2", "Question": "Who?", "Answer": {"Value": "Ann (the elder)"}, "EntityPages": LAMP},
    ],
    "Domain": "Web",
}


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_trivia(folder: Path) -> Path:
    write(
        folder / "evidence" / "wikipedia" / "Lamp.txt",
        "Title\n\nIt burned oil of\nwhales once. Oil of Whales burns well.",
    )
    line = "Whale oil it was that the lamp did burn, which oil is thin. " + "word " * 12
    write(folder / "evidence" / "web" / "7" / "7_1.txt", f"nothing of note here\n{line}\nwhale oils are another thing")
    return write(folder / "qa" / "web-train.json", TRIVIA)


def test_squad_keeps_every_answer_once_and_counts_questions_without(tmp_path: Path) -> None:
    done = convert_files("squad", [write(tmp_path / "s.json", SQUAD)], tmp_path / "out.jsonl")
    assert read(tmp_path / "out.jsonl") == [
        {"passages": [PASSAGE], "question": "What burned?", "answer": ["whale oil", "gas"]}
    ]
    assert (done.records, done.skipped) == (1, {"unanswerable": 1})


def test_drop_answers_are_numbers_dates_or_spans_together(tmp_path: Path) -> None:
    done = convert_files("drop", [write(tmp_path / "d.json", DROP)], tmp_path / "out.jsonl")
    assert [record["answer"] for record in read(tmp_path / "out.jsonl")] == [
        ["2"],
        ["whale oil, gas", "oil and gas"],
        ["May 1811"],
    ]
    assert done.skipped == {"unanswerable": 1}


def test_trivia_passages_hold_the_answer_and_the_best_come_first(tmp_path: Path) -> None:
    path = write_trivia(tmp_path)
    done = convert_files("triviaqa", [path], tmp_path / "out.jsonl", ConvertOptions(passage_words=14))
    (record,) = read(tmp_path / "out.jsonl")
    assert record["answer"] == ["whale oil", "oil of whales"]
    assert record["passages"] == [
        "Whale oil it was that the lamp did burn, which oil is thin. word",
        "Title\nIt burned oil of\nwhales once. Oil of Whales burns well.",
    ]
    assert done.skipped == {"no_evidence": 1}
    options = ConvertOptions(passage_words=14, max_passages=1, first_answer=True)
    convert_files("triviaqa", [path], tmp_path / "out.jsonl", options, overwrite=True)
    (record,) = read(tmp_path / "out.jsonl")
    assert (len(record["passages"]), record["answer"]) == (1, ["whale oil"])


@pytest.mark.parametrize(
    ("format_name", "content", "message"),
    [
        ("squad", DROP, r"in\.json: not of the format squad \(the field 'data' is missing\)"),
        ("squad", [], "not of the format squad"),
        ("drop", SQUAD, "not of the format drop"),
        ("triviaqa", SQUAD, "'Data' is missing"),
        ("squad", "{", "cannot be read as JSON"),
        ("drop", {"x": {"passage": " ", "qa_pairs": PAIRS[:1]}}, "question a: .*'passages'"),
        ("hotpot", SQUAD, "expected one of squad, drop, triviaqa"),
    ],
)
def test_a_file_of_another_format_is_named_and_nothing_is_written(
    tmp_path: Path, format_name: str, content: Any, message: str
) -> None:
    path = write(tmp_path / "in.json", content)
    with pytest.raises(DataError, match=message):
        convert_files(format_name, [path], tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["in.json"]


def test_missing_evidence_is_an_error_with_the_cure(tmp_path: Path) -> None:
    path = write_trivia(tmp_path)
    (tmp_path / "evidence" / "web" / "7" / "7_1.txt").unlink()
    with pytest.raises(DataError, match=r"7_1\.txt: No such file.*--evidence"):
        convert_files("triviaqa", [path], tmp_path / "out.jsonl")


def test_the_command_line_converts_what_a_build_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "s.json", SQUAD)
    out = tmp_path / "out.jsonl"
    assert main(["shards", "convert", "squad", str(source), "--out", str(out)]) == 0
    assert "1 records; questions left out: 1 unanswerable" in capsys.readouterr().out
    assert main(["shards", "convert", "squad", str(source), "--out", str(out)]) == 2
    tokenizer = write_tiktoken(tmp_path / "tokenizer.model")
    build_shards([out], tmp_path / "shards", tokenizer, kind="fine_tuning")
    assert ShardSet(tmp_path / "shards").record(0)["question"] == "What burned?"

"""Result files: reading, writing, and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arc_ds.errors import DataError
from arc_ds.evaluation.results import (
    PREDICTIONS,
    RUN,
    Prediction,
    data_digest,
    read_results,
    read_run,
    read_systems,
    select_tasks,
    write_results,
)

LINE: dict[str, Any] = {"id": "q1", "task": "nq", "prediction": "Rome", "references": ["Rome", "Roma"]}


def write(path: Path, *lines: dict[str, Any] | str) -> Path:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def test_a_line_needs_four_fields(tmp_path: Path) -> None:
    (file,) = read_results(
        write(tmp_path / "a.jsonl", LINE, "", {**LINE, "id": 7, "cluster": 3, "raw": None, "model": "m"})
    )
    assert file.predictions == (
        Prediction(id="q1", task="nq", prediction="Rome", references=("Rome", "Roma")),
        Prediction(
            id="7", task="nq", prediction="Rome", references=("Rome", "Roma"), cluster="3", others={"model": "m"}
        ),
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    given = [
        Prediction(id="b", task="nq", prediction="", references=("Zürich",), index=1, nll={"nats": 1.5, "tokens": 2}),
        Prediction(id="a", task="nq", prediction="x\ny\u2028", references=("é",), index=2, raw="x", stop="eos", seed=4),
        Prediction(id="c", task="cnn", prediction="c", references=("d", "e"), lengths={"rows": 3}, others={"k": [1]}),
    ]
    write_results(tmp_path, given, {"protocol": {"name": "clean"}, "data_digest": "d"})
    (file,) = read_results(tmp_path)
    assert file.predictions == (given[2], given[0], given[1])  # by task and index
    assert file.protocol == {"name": "clean"} and file.run["data_digest"] == "d"
    assert read_results(tmp_path / PREDICTIONS)[0].run == file.run
    assert "Zürich" in (tmp_path / PREDICTIONS).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a.jsonl:2: expected JSON in UTF-8: .* Repair or remove this line"),
        ("[1]", "a.jsonl:2: expected a JSON object, got list"),
        (
            {"id": "q"},
            "a.jsonl:2: missing 'task', 'prediction', 'references'; found 'id'. Each line needs 'id', 'task'",
        ),
        ({**LINE, "prediction": None}, "a.jsonl:2: missing 'prediction'; found 'id', 'task'"),
        ({**LINE, "id": ""}, "a.jsonl:2: 'id' is empty"),
        ({**LINE, "id": True}, "a.jsonl:2: 'id' is bool 'True'; expected text or a whole number. Correct or rename it"),
        ({**LINE, "prediction": 5}, "a.jsonl:2: 'prediction' is int '5'; expected text"),
        ({**LINE, "references": "Rome"}, "a.jsonl:2: 'references' is str 'Rome'; expected a list"),
        ({**LINE, "references": []}, r"a.jsonl:2: 'references' is \[\]; expected a list of one or more texts"),
        ({**LINE, "references": [1]}, r"a.jsonl:2: 'references' is \[1\]; expected a list of one or more texts"),
        ({**LINE, "prediction": "\ud83d"}, "a.jsonl:2: a text holds characters that UTF-8 cannot encode"),
        ({**LINE, "nll": {"nats": 1, "tokens": 0}}, "a.jsonl:2: 'nll' is"),
        ({**LINE, "nll": {"nats": float("inf"), "tokens": 1}}, "a.jsonl:2: 'nll' is"),
        ({**LINE, "nll": {"nats": -2.5, "tokens": 1}}, 'a.jsonl:2: .* expected {"nats": -log p'),
        ({**LINE, "lengths": [1]}, "a.jsonl:2: 'lengths' is list"),
        ({**LINE, "lengths": {"vectors": "9"}}, "a.jsonl:2: 'vectors' in 'lengths' is '9'; expected a number"),
        ({**LINE, "task": "\udc80"}, "a.jsonl:2: a text holds characters that UTF-8 cannot encode"),
        (LINE, "a.jsonl:2: the id 'q1' of task 'nq' is on line 1 already. Remove one of both lines"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: dict[str, Any] | str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_results(write(tmp_path / "a.jsonl", LINE, line))


def test_sampled_answers_differ_in_their_seed(tmp_path: Path) -> None:
    (file,) = read_results(write(tmp_path / "a.jsonl", LINE, {**LINE, "seed": 1}))
    assert [each.seed for each in file.predictions] == [0, 1]


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.jsonl cannot be read: No such file or directory. Give a JSONL file"):
        read_results(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="predictions.jsonl cannot be read"):
        read_results(tmp_path)
    with pytest.raises(DataError, match=r"a.jsonl has no lines"):
        read_results(write(tmp_path / "a.jsonl", "", " "))
    (tmp_path / "b.jsonl").write_text(json.dumps(LINE), encoding="utf-16")
    with pytest.raises(DataError, match=r"b.jsonl is UTF-16, expected UTF-8. Convert it: iconv"):
        read_results(tmp_path / "b.jsonl")
    write(tmp_path / PREDICTIONS, LINE)
    (tmp_path / RUN).write_text('{"systems": [1], "skipped": {"too long": 3}, "shortened": {"": {"nq": "x"}}}')
    (file,) = read_results(tmp_path)
    assert (file.description, file.skipped, file.shortened) == ({}, {"too long": {}}, {}), "another program's"
    (tmp_path / RUN).write_text("[]")
    with pytest.raises(DataError, match=r"run.json: expected a JSON object"):
        read_run(tmp_path)


def test_systems_are_named_by_field_file_or_path(tmp_path: Path) -> None:
    folders = [tmp_path / "x" / "run", tmp_path / "y" / "run"]
    for folder in folders:
        folder.mkdir(parents=True)
        write(folder / PREDICTIONS, LINE)
    both = write(tmp_path / "both.jsonl", {**LINE, "system": "open"}, {**LINE, "system": "closed"})
    found = read_systems([str(both), str(write(tmp_path / "plain.jsonl", LINE))])
    assert [each.name for each in found] == ["open", "closed", "plain"]
    assert [each.name for each in read_systems([str(folders[0])])] == ["run"]
    assert [each.name for each in read_systems([str(folders[0] / PREDICTIONS)])] == ["run"]
    assert [each.name for each in read_systems(list(map(str, folders)))] == [f"run ({folder})" for folder in folders]
    twice = [each.name for each in read_systems([str(folders[0])] * 2)]
    assert len(set(twice)) == 2


def test_files_between_commas_are_seeds_of_one_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    long = [write(Path(f"{n}{'x' * 90}.jsonl"), {**LINE, "system": "arc"}) for n in range(3)]
    assert len(read_systems([",".join(map(str, long))])[0].seeds) == 3, "the list is too long for the name of a file"
    paths = [str(write(tmp_path / f"{name}.jsonl", {**LINE, "system": "arc"})) for name in "abc"]
    (found,) = read_systems([",".join(paths)])
    assert found.name == "arc" and [str(seed.path) for seed in found.seeds] == paths
    for wrong in (f"{paths[0]},{paths[1]},{paths[0]}", f"{paths[0]},"):
        with pytest.raises(DataError, match="names a file twice, or none between two commas"):
            read_systems([wrong])
    comma = str(write(tmp_path / "a,b.jsonl", LINE))
    assert len(read_systems([comma])[0].seeds) == 1
    both = write(tmp_path / "both.jsonl", LINE, {**LINE, "system": "closed"})
    with pytest.raises(DataError, match=r"both.jsonl holds several systems \(\(no name\), closed\); expected one"):
        read_systems([f"{paths[0]},{both}"])


def test_tasks_are_selected(tmp_path: Path) -> None:
    systems = read_systems([str(write(tmp_path / "a.jsonl", LINE, {**LINE, "task": "squad"}))])
    assert [each.task for each in select_tasks(systems, ["squad"])[0].seeds[0].predictions] == ["squad"]
    with pytest.raises(DataError, match=r"a.jsonl has no answers to cnn; it has nq, squad. Correct --tasks"):
        select_tasks(systems, ["nq", "cnn"])


def test_a_data_digest_knows_ids_and_references_in_any_order() -> None:
    samples = [("a", ("x", "y")), ("b", ("z",))]
    assert data_digest(samples) == data_digest(samples[::-1]) == data_digest([("a", ["x", "y"]), ("b", ["z"])])
    others = [[("a", ("x",)), ("b", ("z",))], [("a", ("y", "x")), ("b", ("z",))], [("a", ("x", "y")), ("c", ("z",))]]
    assert data_digest(samples) not in [data_digest(other) for other in others]

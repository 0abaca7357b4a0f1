"""`arc-ds eval score`, `compare` and `import`."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arc_ds.cli import main
from arc_ds.evaluation.metrics import METRICS_OF
from arc_ds.evaluation.results import PREDICTIONS, RUN, SEEDS_NOTE, Prediction, read_results, write_results
from arc_ds.launch.exit_codes import EXIT_USER_ERROR
from tests.unit.evaluation.test_comparison import improved
from tests.unit.evaluation.test_scoring import questions, translations


def write(path: Path, lines: Sequence[Prediction], fields: Sequence[str] = ()) -> str:
    keys = ("id", "task", "prediction", "references", *fields)
    records = ({key: getattr(line, key) for key in keys} for line in lines)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(["eval", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["eval", *arguments]) == EXIT_USER_ERROR
    return capsys.readouterr().err


def test_json_holds_value_low_high_and_n_of_each_task_and_metric(tmp_path: Path, capsys) -> None:
    tasks = [each for each in METRICS_OF]
    lines = [line for task in tasks for line in questions(12, 0.5, task=task)]
    found = printed(capsys, "score", "--json", write(tmp_path / "a.jsonl", lines))
    assert {task: tuple(metrics) for task, metrics in found.items()} == METRICS_OF
    for metrics in found.values():
        for score in metrics.values():
            assert list(score) == ["value", "low", "high", "n"] and score["n"] == 12
            assert 0 <= score["low"] <= score["value"] <= score["high"] <= 100
    right = sum(line.prediction == "Rome" for line in lines[:12])
    assert found["squad"]["em"]["value"] == pytest.approx(100 * right / 12)


def test_several_systems_are_nested_by_name(tmp_path: Path, capsys) -> None:
    lines = questions(30, 0.4)
    paths = [write(tmp_path / f"{name}.jsonl", lines) for name in ("open", "closed")]
    found = printed(capsys, "score", "--json", *paths, "--tasks", "squad")
    assert list(found) == ["open", "closed"] and found["open"] == found["closed"]
    assert "squad" in printed(capsys, "score", "--json", ",".join(paths))  # two seeds are one system


def test_the_table_has_intervals_average_and_signatures(tmp_path: Path, capsys, caplog) -> None:
    lines = [*questions(30, 0.4), *translations(10, ["eng-fra"], 0.8)]
    lines[0] = Prediction(id="q0", task="squad", prediction="", references=("x", ""))
    path, other = (write(tmp_path / f"{name}.jsonl", lines) for name in "ab")
    with caplog.at_level(logging.WARNING):
        assert main(["eval", "score", f"{path},{other}"]) == 0
    out = capsys.readouterr().out
    title, head, *rows = out.splitlines()
    assert title == "All metrics" and head.split()[:6] == ["system", "task", "metric", "score", "low", "high"]
    assert [row.split()[1:3] for row in rows[:8:7]] == [["flores", "bleu"], ["average", "headlines"]]
    assert "bleu: nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp" in out
    assert "Otherwise they hold for its seeds." in out
    assert "2 predictions of task squad are empty; they are scored as such" in caplog.text
    assert "2 answers of task squad have a reference without text, which 'substring' finds" in caplog.text


def test_questions_that_were_not_asked_are_named(tmp_path: Path, capsys, caplog) -> None:
    write_results(tmp_path, questions(6, 0.4), {"skipped": {"too long": {"": {"squad": ["q8", "q9"]}}}})
    with caplog.at_level(logging.WARNING):
        printed(capsys, "score", "--json", str(tmp_path))
    assert "2 questions of task squad were not asked (too long); the scores leave them out" in caplog.text
    write_results(tmp_path, questions(6, 0.4), {"skipped": {"too long": {"": {"squad": 3}}, "other": None}})
    printed(capsys, "score", "--json", str(tmp_path))
    assert "3 questions of task squad were not asked" in caplog.text


def test_one_cluster_has_null_limits(tmp_path: Path, capsys) -> None:
    found = printed(capsys, "score", "--json", write(tmp_path / "a.jsonl", questions(1, 1.0)))
    assert found["squad"]["em"]["low"] is None and found["squad"]["em"]["n"] == 1


def test_compare_prints_the_differences_to_the_first_system(tmp_path: Path, capsys) -> None:
    lines = [*questions(60, 0.4), *translations(20, ["eng-fra", "eng-deu"], 0.8)]
    better = [*improved(lines[:60], 4), *lines[60:]]
    paths = [
        write(tmp_path / f"{name}.jsonl", each, ["group"]) for name, each in (("a", lines), ("b", better), ("c", lines))
    ]
    found = printed(capsys, "compare", "--json", *paths)
    assert found["first"] == "a" and list(found["systems"]) == ["b", "c"]
    em = found["systems"]["b"]["tasks"]["squad"]["em"]
    assert em["test"] == "mcnemar" and em["value"] == pytest.approx(em["second"] - em["first"]) and em["p_holm"] < 0.05
    assert found["systems"]["c"]["tasks"]["squad"]["em"]["p"] == 1.0
    assert found["systems"]["b"]["tasks"]["flores"]["bleu"]["n"] == 40
    assert found["systems"]["b"]["average"]["value"] == pytest.approx(em["value"] / 2)

    assert main(["eval", "compare", *paths]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Paired differences from a\n  system ") and "\n  c " in out and "detectable" in out
    assert "mcnemar" in out and f"+{em['value']:.2f}" in out and "seeds" not in out
    assert main(["eval", "compare", f"{paths[0]},{paths[2]}", paths[1]]) == 0
    assert capsys.readouterr().out.endswith(f"{SEEDS_NOTE}\n")


def test_compare_refuses_one_system_and_other_questions(tmp_path: Path, capsys) -> None:
    lines = questions(30, 0.4)
    path = write(tmp_path / "a.jsonl", lines)
    assert "a.jsonl holds one system; expected two or more" in failure(capsys, "compare", path)
    other = write(tmp_path / "b.jsonl", lines[1:])
    assert "1 ids are (q0) only in the first one" in failure(capsys, "compare", path, other)


def test_an_import_of_whole_lines_is_scored_like_ours(tmp_path: Path, capsys) -> None:
    path, out = write(tmp_path / "a.jsonl", questions(30, 0.4), ["cluster"]), str(tmp_path / "out" / "other")
    assert main(["eval", "import", path, "--system", "LCLM", "--out", out]) == 0
    assert capsys.readouterr().out == f"{out}: 30 predictions of LCLM (30 of squad)\n"
    assert printed(capsys, "score", "--json", out) == printed(capsys, "score", "--json", path)
    (file,) = read_results(Path(out))
    assert file.system == "LCLM" and [line.index for line in file.predictions] == list(range(30))
    assert file.run["system"] == {"name": "LCLM", "kind": "import"} and len(file.run["source"]["sha256"]) == 64
    assert "exists already" in failure(capsys, "import", path, "--system", "LCLM", "--out", out)
    Path(path).write_text(Path(path).read_text().replace('"squad"', "null"))
    assert main(["eval", "import", path, "--system", "x", "--out", out, "--overwrite", "--task", "nq"]) == 0
    assert {line.task for line in read_results(Path(out))[0].predictions} == {"nq"}


def test_an_import_takes_questions_from_a_reference_result(tmp_path: Path, capsys) -> None:
    ours = tmp_path / "ours"
    ours.mkdir()
    lines = [replace(line, cluster=str(i)) for i, line in enumerate(questions(6, 0.4))]
    write_results(ours, lines, {"data_digest": "d"})
    given = [{"id": line.id, "prediction": "Rome", "task": None, "cluster": i} for i, line in enumerate(lines)]
    options = ["--system", "x", "--reference", str(ours)]

    def imported(name: str, records: Sequence[dict[str, Any]]) -> list[str]:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return ["import", str(path), *options, "--out", str(tmp_path / name)]

    assert main(["eval", *imported("good", given)]) == 0
    (file,) = read_results(tmp_path / "good")
    assert [(line.references, line.cluster) for line in file.predictions] == [
        (line.references, line.cluster) for line in lines
    ]
    assert file.run["data_digest"] == "d" and (tmp_path / "good" / RUN).exists()
    sampled = [{**line, "seed": seed} for seed in range(2) for line in given]
    assert main(["eval", *imported("sampled", sampled), "--task", "squad"]) == 0
    assert len(read_results(tmp_path / "sampled")[0].predictions) == 12
    capsys.readouterr()
    assert printed(capsys, "compare", "--json", str(ours), str(tmp_path / "good"))["systems"]["x"]["tasks"]["squad"]

    faults = {
        "missing": (given[2:], "missing.jsonl: 2 of 6 ids are missing (q0, q1). Add them."),
        "double": ([*given, given[0]], "double.jsonl:7: the id 'q0' of task 'squad' is on line 1 already"),
        "other": (
            [{"id": "zz", "prediction": ""}],
            "other.jsonl:1: the id 'zz' is not among the questions; expected ids",
        ),
        "wrong": ([{**given[0], "references": ["Oslo"]}], "wrong.jsonl:1: 'references' of id 'q0' is ['Oslo'], but"),
        "task": ([{**given[0], "task": ["squad"]}], "task.jsonl:1: missing 'references'"),
        "none": ([{"id": "q0", "prediction": None}], "none.jsonl:1: missing 'prediction'"),
        "system": ([{**given[0], "system": "y"}], "system.jsonl:1: the line is of system 'y', but --system is 'x'"),
    }
    for name, (records, message) in faults.items():
        assert message in failure(capsys, *imported(name, records))
        assert not (tmp_path / name).exists()


def test_an_import_takes_questions_from_a_dataset(tmp_path: Path, capsys) -> None:
    paragraph: dict[str, Any] = {"context": "Rome is old. Oslo is not.", "qas": []}
    for name, text in (("q0", "Rome"), ("q1", "Oslo")):
        answers = [{"text": text, "answer_start": 0}, {"text": f"{text} city", "answer_start": 0}]
        paragraph["qas"].append({"id": name, "question": f"Which is {name}?", "answers": answers})
    data = tmp_path / "dev.json"
    data.write_text(json.dumps({"version": "1.1", "data": [{"title": "Towns", "paragraphs": [paragraph]}]}))
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps({"id": name, "prediction": "Rome"}) + "\n" for name in ("q1", "q0")))
    options = ["--system", "x", "--out", str(out), "--dataset", str(data)]
    assert "--dataset needs the name of its task. Add --task NAME." in failure(capsys, "import", str(path), *options)
    assert "no evaluation task is called 'sqad'" in failure(capsys, "import", str(path), *options, "--task", "sqad")
    assert main(["eval", "import", str(path), *options, "--task", "squad", "--protocol", "reference"]) == 0
    lines = [json.loads(line) for line in (out / PREDICTIONS).read_text().splitlines()]
    assert [(line["id"], line["cluster"], line["references"], line["index"]) for line in lines] == [
        ("q0", "Towns", ["Rome"], 0),
        ("q1", "Towns", ["Oslo"], 1),
    ]

"""Readers: every layout that people have gives the same samples, and other layouts one clear error."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arc_ds.errors import ConfigError, DataError
from arc_ds.evaluation.datasets import TASKS, find_task
from arc_ds.evaluation.datasets.reading import read_objects
from arc_ds.evaluation.protocol import CLEAN, REFERENCE
from arc_ds.evaluation.sample import EvalSample
from tests.unit.evaluation import small_files as files
from tests.unit.evaluation.small_files import PARAGRAPHS, QUESTIONS, RIVERS, write_json, write_lines, write_parquet

Writer = Callable[[Path], Path]


def read(name: str, path: Path) -> list[EvalSample]:
    return list(find_task(name).read(path, CLEAN))


def contents(samples: Sequence[EvalSample]) -> list[tuple[str | None, tuple[str, ...], tuple[str, ...]]]:
    return [(sample.question, sample.passages, sample.references) for sample in samples]


def rows(make: Callable[[str, str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    return [make(*texts) for texts in zip(QUESTIONS, PARAGRAPHS, RIVERS, strict=True)]


def in_lines(make: Callable[[str, str, str], dict[str, Any]]) -> Writer:
    return lambda folder: write_lines(folder / "rows.jsonl", rows(make))


ONE_PASSAGE = {
    "text in passages": in_lines(lambda q, p, a: {"question": q, "passages": p, "answer": a}),
    "list in passages": in_lines(lambda q, p, a: {"question": q, "passages": [p], "answer": [a]}),
    "record of shards": in_lines(lambda q, p, a: {"instruction": q, "passage": p, "answer": a}),
    "DPR": in_lines(lambda q, p, a: {"question": q, "answers": [a], "ctxs": [{"title": "T", "text": p, "score": "1"}]}),
    "DPR training": in_lines(lambda q, p, a: {"question": q, "answers": [a], "positive_ctxs": [{"text": p}]}),
    "KILT": in_lines(
        lambda q, p, a: {"id": q, "input": q, "output": [{"answer": a, "provenance": [{"title": "T", "text": p}]}]}
    ),
    "KILT with the passages of a retriever": in_lines(
        lambda q, p, a: {
            "input": q,
            "output": [{"answer": a, "provenance": [{"text": "Gold."}]}],
            "ctxs": [{"title": "T", "text": p}],
        }
    ),
    "array": lambda folder: write_json(
        folder / "a.json", rows(lambda q, p, a: {"question": q, "context": p, "answers": {"text": [a, a]}})
    ),
    "Parquet": lambda folder: write_parquet(
        folder / "a.parquet", rows(lambda q, p, a: {"question": q, "context": p, "answers": {"text": [a]}})
    ),
    "flattened Parquet": lambda folder: write_parquet(
        folder / "b.parquet",
        rows(lambda q, p, a: {"question": q, "context": p, "answers": {"text": [a]}}),
        flatten=True,
    ),
}


@pytest.mark.parametrize("layout", list(ONE_PASSAGE))
def test_rows_of_every_layout_give_the_same_samples(layout: str, tmp_path: Path) -> None:
    expected = [(q, (p,), (a,)) for q, p, a in zip(QUESTIONS, PARAGRAPHS, RIVERS, strict=True)]
    assert contents(read("qa", ONE_PASSAGE[layout](tmp_path))) == expected


def test_compressed_lines_arrow_folders_and_patterns_are_read(tmp_path: Path) -> None:
    import pyarrow
    import zstandard

    given = rows(lambda q, p, a: {"question": q, "passages": [p], "answer": a})
    lines = tmp_path / "lines" / "part.jsonl.gz"
    lines.parent.mkdir()
    # Lines of Windows: with a byte order mark, and with a carriage return before each line's end.
    from_windows = ("\ufeff" + "\r\n".join(map(json.dumps, given)) + "\r\n").encode()
    lines.write_bytes(gzip.compress(from_windows))
    (lines.parent / ".part.jsonl").write_text("{}", encoding="utf-8")  # hidden files are passed over
    others = [tmp_path / "a" / name for name in ("part.jsonl", "part.json", "part.jsonl.zst", "array.json.gz")]
    array = gzip.compress(json.dumps(given).encode())
    for path, content in zip(
        others, (from_windows, from_windows, zstandard.compress(from_windows), array), strict=True
    ):
        path.write_bytes(content)
    table = pyarrow.Table.from_pylist(given)
    arrow = tmp_path / "saved" / "data-00000-of-00001.arrow"
    arrow.parent.mkdir()
    with pyarrow.ipc.new_stream(str(arrow), table.schema) as writer:
        writer.write_table(table)
    write_json(arrow.parent / "dataset_info.json", {"features": {}})
    for name in ("validation-00000-of-00002", "validation-00001-of-00002", "train-00000-of-00001"):
        (tmp_path / "data").mkdir(exist_ok=True)
        write_parquet(tmp_path / "data" / f"{name}.parquet", given[int(name[15]) :][:1])
    expected = contents(read("qa", lines))
    assert len(expected) == 3 and contents(read("qa", arrow)) == expected
    assert all(contents(read("qa", path)) == expected for path in others)
    assert contents(read("qa", arrow.parent)) == expected and contents(read("qa", lines.parent)) == expected
    assert contents(read("qa", tmp_path / "data" / "validation-*.parquet")) == expected[:2]
    with pytest.raises(DataError, match=r"several splits: train, validation.*a pattern such as .*/data/\*train\*"):
        read("qa", tmp_path / "data")


def test_lines_are_read_one_after_the_other_whatever_their_ending(tmp_path: Path) -> None:
    """A damaged last line is found only after the lines before it, so a huge file is not held in memory."""
    good = json.dumps({"question": "Who?", "passages": "Text.", "answer": "a"})
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text(f"{good}\n{good}\n{{damaged\n", encoding="utf-8")
        objects = read_objects(tmp_path / name)
        assert [next(objects)[0] for _ in range(2)] == [f"{tmp_path / name}, line {number}" for number in (1, 2)]
        with pytest.raises(DataError, match="line 3: expected JSON"):
            next(objects)


@pytest.mark.parametrize("pair", [("hotpot_train_v1.1.json", "hotpot_dev_v1.json"), ("train/a.json", "dev/a.json")])
def test_a_folder_of_several_splits_is_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    for name in pair:
        write_json(tmp_path / "data" / name, [{"question": name, "answer": "a"}])
    with pytest.raises(DataError, match=r"several splits: dev, train"):
        read("nq", tmp_path / "data")
    (tmp_path / "data" / pair[0]).rename(tmp_path / "data" / "latest.json")
    assert len(read("nq", tmp_path / "data")) == 2


OTHER_LAYOUTS: dict[str, tuple[str, Writer]] = {
    "TriviaQA, JSON lines": ("triviaqa", lambda folder: write_lines(folder / "t.jsonl", files.triviaqa_rows())),
    "HotpotQA of the Hub": (
        "hotpotqa",
        lambda folder: write_parquet(
            folder / "h.parquet",
            [
                {
                    "id": row["_id"],
                    "question": row["question"],
                    "answer": row["answer"],
                    "context": {"title": [c[0] for c in row["context"]], "sentences": [c[1] for c in row["context"]]},
                }
                for row in files.hotpotqa_rows()
            ],
        ),
    ),
    "FLORES, lines": (
        "flores",
        lambda folder: files.write_texts(
            folder / "dev",
            {f"{code}.dev": "\r\n".join(texts) + "\r\n" * (code != "eng_Latn") for code, texts in files.FLORES.items()},
        ),
    ),
    "FLORES of the Hub": (
        "flores",
        lambda folder: write_parquet(
            folder / "f.parquet",
            [{f"sentence_{code}": texts[idx] for code, texts in files.FLORES.items()} for idx in range(3)],
        ),
    ),
    "CNN, stories": (
        "cnn",
        lambda folder: files.write_texts(
            folder / "cnn",
            {
                f"{r}.story": f"{p}\n\n@highlight\n\n{r} .\n\n@highlight\n\nA city .\n"
                for p, r in sorted(zip(PARAGRAPHS, RIVERS, strict=True), key=lambda pair: pair[1])
            },
        ),
    ),
    "XSum, BBC": (
        "xsum",
        lambda folder: files.write_texts(
            folder / "xsum",
            {
                f"{r}.summary": "[SN]URL[SN]\nhttp://x\n\n[SN]TITLE[SN]\nT\n\n[SN]FIRST-SENTENCE[SN]\n"
                f"A city on {r}.\n\n[SN]RESTBODY[SN]\n{p}\n".replace("\n", line_end)
                for p, r, line_end in zip(PARAGRAPHS, RIVERS, ("\n", "\r\n", "\n"), strict=True)
            },
        ),
    ),
    "NarrativeQA, folder": (
        "narrativeqa",
        lambda folder: files.write_texts(
            folder / "n",
            {
                "qaps.csv": "document_id,set,question,answer1,answer2\n"
                "d0,train,Who?,x,y\nd1,valid,Who loses a boat?,A ferryman,a man\n"
                "d1,valid,Who is the hero?,A ferryman,a man\n",
                "tmp/d1.content": "A ferryman\nloses his boat.",
            },
        ),
    ),
    "NarrativeQA, SCROLLS": (
        "narrativeqa",
        lambda folder: write_lines(
            folder / "s.jsonl",
            [
                {"id": q, "pid": f"{q}_{idx}", "input": f"{q}\n\nA ferryman\nloses his boat.", "output": answer}
                for q in ("Who loses a boat?", "Who is the hero?")
                for idx, answer in enumerate(("A ferryman", "a man"))
            ],
        ),
    ),
    "NarrativeQA, the reference's": (
        "narrativeqa",
        lambda folder: write_lines(
            folder / "r.jsonl",
            [
                {"question": q, "passage": "A ferryman\nloses his boat.", "answer": ["A ferryman", "a man"]}
                for q in ("Who loses a boat?", "Who is the hero?")
            ],
        ),
    ),
    "GovReport, CRS": (
        "govreport",
        lambda folder: write_json(
            folder / "R1.json",
            {
                "id": "R1",
                "summary": "What GAO Found\nDams leak.",
                "reports": {
                    "section_title": "Dams",
                    "paragraphs": ["Dams age.", "Some leak."],
                    "subsections": [{"section_title": "Costs", "paragraphs": ["They rose."], "subsections": []}],
                },
            },
        ),
    ),
    "GovReport, CRS, a summary in paragraphs": (
        "govreport",
        lambda folder: write_json(
            folder / "R2.json",
            {
                "summary": ["What GAO Found", "Dams leak."],
                "reports": {"paragraphs": ["Dams\nDams age.\nSome leak.\n\nCosts\nThey rose."]},
            },
        ),
    ),
    "GovReport of the Hub": (
        "govreport",
        lambda folder: write_parquet(
            folder / "g.parquet",
            [{"report": "Dams\nDams age.\nSome leak.\n\nCosts\nThey rose.", "summary": "What GAO Found\nDams leak."}],
        ),
    ),
    "QMSum, SCROLLS": (
        "qmsum",
        lambda folder: write_lines(
            folder / "q.jsonl",
            [
                {"id": "a", "input": "Summarize the meeting.\n\nA: Boats?\nB: Two.", "output": "They count boats."},
                {"id": "b", "input": "What did B say?\n\nA: Boats?\nB: Two.", "output": "Two."},
            ],
        ),
    ),
}


@pytest.mark.parametrize("layout", list(OTHER_LAYOUTS))
def test_other_layouts_of_a_data_set_give_the_samples_of_the_original_one(layout: str, tmp_path: Path) -> None:
    name, write = OTHER_LAYOUTS[layout]
    original, other = read(name, files.WRITERS[name](tmp_path / "a")), read(name, write(tmp_path / "b"))
    assert sorted(contents(other)) == sorted(contents(original))
    assert len({sample.cluster for sample in other}) == len({sample.cluster for sample in original})


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()


def test_qasper_of_the_hub_and_scrolls_by_question_and_by_row(tmp_path: Path) -> None:
    ((_, paper),) = files.qasper_papers().items()
    columns = {
        "full_text": {name: [s[name] for s in paper["full_text"]] for name in ("section_name", "paragraphs")},
        "qas": {
            "question": [q["question"] for q in paper["qas"]],
            "question_id": [q["question_id"] for q in paper["qas"]],
            "answers": [
                {name: [a[name] for a in q["answers"]] for name in ("answer", "annotation_id")} for q in paper["qas"]
            ],
        },
    }
    hub = write_parquet(tmp_path / "hub.parquet", [paper | columns | {"id": "1705.09665"}])
    texts = ("two tides, one moon", "Tides.", "unanswerable", "no")
    document = "On Tides\n\nWe count tides.\n\nData\nTwo tides.\nOne moon."
    scrolls = write_lines(
        tmp_path / "scrolls.jsonl",
        [
            {"id": "q1", "pid": f"q1_{idx}", "input": f"What is counted?\n\n{document}", "output": text}
            for idx, text in enumerate(texts)
        ],
    )
    by_row = replace(CLEAN, qasper_by_question=False)
    other = [{"id": "q1", "input": f"{question}?\n\n{document}", "output": "a"} for question in ("Who", "What")]
    with pytest.raises(DataError, match=r"line 2: the id q1 occurs a second time"):
        read("qasper", write_lines(tmp_path / "other.jsonl", other))
    for path in (files.qasper(tmp_path), hub, scrolls):
        (sample,) = TASKS["qasper"].read(path, CLEAN)
        assert (sample.id, sample.references, sample.passages) == ("q1", texts, (document,))
        samples = TASKS["qasper"].read(path, by_row)
        assert [(s.id, s.references) for s in samples] == [(f"q1_{idx}", (text,)) for idx, text in enumerate(texts)]
        assert {s.cluster for s in samples} == {sample.cluster}


def test_triviaqa_with_its_evidence(tmp_path: Path) -> None:
    question = {
        "QuestionId": "tc_1",
        "Question": "Which oil?",
        "Answer": {"Value": "whale oil", "Aliases": ["Whale oil", "oil"], "HumanAnswers": ["the oil"]},
        "EntityPages": [{"Filename": "Lamp.txt"}],
        "SearchResults": [{"Filename": "7/7_1.txt"}],
    }
    path = write_json(tmp_path / "qa" / "web-dev.json", {"Data": [question]})
    (closed,) = read("triviaqa", path)
    assert closed.passages == () and closed.references == ("whale oil", "Whale oil", "oil", "the oil")
    files.write_texts(tmp_path / "evidence", {"wikipedia/Lamp.txt": "A lamp burns oil."})
    assert read("triviaqa", path.parent)[0].passages == ("A lamp burns oil.",)
    (opened,) = TASKS["triviaqa"].read(path, REFERENCE)
    assert opened.passages == ("A lamp burns oil.",) and opened.references == ("Whale oil", "oil")
    (tmp_path / "evidence" / "wikipedia" / "Lamp.txt").unlink()
    with pytest.raises(DataError, match=r"Lamp.txt cannot be read.*Unpack.*file's folder\.$"):
        read("triviaqa", path)


def test_passages_of_a_retriever_come_before_triviaqa_s_documents(tmp_path: Path) -> None:
    rows = [row | {"ctxs": [{"title": "T", "text": "Found."}]} for row in files.triviaqa_rows()]
    assert {sample.passages for sample in read("triviaqa", write_lines(tmp_path / "t.jsonl", rows))} == {("Found.",)}


def test_references_are_all_or_the_first_one_of_nq_and_squad(tmp_path: Path) -> None:
    for name in ("nq", "squad"):
        path = files.WRITERS[name](tmp_path)
        assert [len(sample.references) for sample in TASKS[name].read(path, CLEAN)] == [2, 2, 2]
        assert [len(sample.references) for sample in TASKS[name].read(path, REFERENCE)] == [1, 1, 1]


def test_clusters(tmp_path: Path) -> None:
    assert [sample.cluster for sample in read("squad", files.squad(tmp_path))] == ["Rivers", "Rivers", "Quay"]
    hub = [
        {"question": f"{idx}?", "context": f"Text {idx}.", "title": "Quay", "answers": {"text": ["a"]}}
        for idx in range(2)
    ]
    assert {sample.cluster for sample in read("squad", write_lines(tmp_path / "h.jsonl", hub))} == {"Quay"}
    same = [{"question": f"{idx}?", "passages": ["One text."], "answer": "a"} for idx in range(3)]
    own = [row | {"cluster": 0} for row in same[:1]]
    for name, number in (("squad", 1), ("qa", 1), ("nq", 3)):
        assert len({sample.cluster for sample in read(name, write_lines(tmp_path / "c.jsonl", same))}) == number
    assert read("qa", write_lines(tmp_path / "c.jsonl", own))[0].cluster == "0"
    flores = read("flores", files.flores(tmp_path))
    assert len(flores) == 12 and {s.group for s in flores} == {"eng-spa", "eng-fra", "eng-deu", "eng-dan"}
    assert len({sample.cluster for sample in flores}) == 3


def test_squad_with_and_without_unanswerable_questions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = files.squad(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert len(read("squad", path)) == 3
    assert "squad: left out 3 of 6 questions, which have no answer" in caplog.text
    assert [sample.references[0] for sample in read("squad2", path)] == [
        text for river in RIVERS for text in (river, "unanswerable")
    ]
    unanswerable = ({"text": []}, {"text": [""]}, None, "")
    rows = [{"question": f"{idx}?", "context": "Text.", "answers": answers} for idx, answers in enumerate(unanswerable)]
    rows.append({"question": "4?", "context": "Text.", "answers": {"text": ["plausible"]}, "is_impossible": True})
    found = read("squad2", write_lines(tmp_path / "rows.jsonl", rows))
    assert [sample.references for sample in found] == [("unanswerable",)] * 5


def test_any_pair_of_flores(tmp_path: Path) -> None:
    files.flores(tmp_path)
    write_lines(tmp_path / "flores" / "zho_Hans.jsonl", [{"text": text} for text in "一二三"])
    samples = read("flores:deu-zho_Hans", tmp_path / "flores")
    assert samples[0].question == "Translate the previous document into Chinese (Simplified)."
    assert (samples[0].passages, samples[0].references, samples[0].group) == (("Ein Boot.",), ("一",), "deu-zho_Hans")
    assert find_task("flores:arb-eng").name == "flores:arb-eng"
    for name, words in {
        "flores:deu-zho": "expected one of zho_Hans, zho_Hant",
        "flores:deu-xyz": "'xyz' is no language of FLORES",
        "flores:deu": "flores:SOURCE-TARGET",
        "hotpot": "Did you mean hotpotqa",
    }.items():
        with pytest.raises(ConfigError, match=words):
            find_task(name)


def test_flores_that_is_not_parallel_or_lacks_a_language_is_refused(tmp_path: Path) -> None:
    folder = files.flores(tmp_path)
    write_lines(folder / "deu_Latn.jsonl", [{"text": "Ein Boot."}])
    with pytest.raises(DataError, match="'deu_Latn': 1.*must be parallel"):
        read("flores", folder)
    (folder / "devtest").mkdir()
    (folder / "deu_Latn.jsonl").rename(folder / "devtest" / "fra_Latn.jsonl")
    with pytest.raises(
        DataError, match=r"one file fra_Latn.\*, found the files devtest/fra_Latn.jsonl, fra_Latn.jsonl"
    ):
        read("flores", folder)
    (folder / "devtest" / "fra_Latn.jsonl").unlink()
    with pytest.raises(DataError, match=r"one file deu_Latn.\*, found none"):
        read("flores", folder)


def test_instructions_of_the_file_are_kept(tmp_path: Path) -> None:
    row = {"passage": "Text.", "answer": "a", "instruction": "Do it."}
    (report,) = read("govreport", write_lines(tmp_path / "g.jsonl", [row]))
    assert (report.instruction, report.question) == ("Do it.", None)
    asked = {"passage": "Text.", "answer": "a", "question": "Shorten it."}
    (report,) = read("govreport", write_lines(tmp_path / "g.jsonl", [asked]))
    assert (report.instruction, report.question) == ("Shorten it.", None)
    (question,) = read("qasper", write_lines(tmp_path / "q.jsonl", [row | {"question": "Why?"}]))
    assert (question.instruction, question.question) == ("Do it.", "Why?")


def test_the_reference_counts_each_row_of_a_long_task(tmp_path: Path) -> None:
    """Its permutation goes over the rows, so two rows that ask the same stay two samples (notes, sections 3 and 9)."""
    same = [{"question": "Who?", "passage": "Text.", "answer": answer} for answer in (["a", "b"], ["c"])]
    for name in ("narrativeqa", "qasper", "qmsum"):
        path = write_lines(tmp_path / "same.jsonl", same)
        assert [sample.references for sample in read(name, path)] == [("a", "b", "c")]
        assert [sample.references for sample in TASKS[name].read(path, REFERENCE)] == [("a", "b"), ("c",)]
    csv = "document_id,set,question,answer1,answer2\nd1,valid,Who?,a,b\nd1,valid,Who?,c,\n"
    folder = files.write_texts(tmp_path / "n", {"qaps.csv": csv, "stories/d1.content": "Text."})
    assert [sample.references for sample in read("narrativeqa", folder)] == [("a", "b", "c")]
    assert [sample.references for sample in TASKS["narrativeqa"].read(folder, REFERENCE)] == [("a", "b"), ("c",)]


@pytest.mark.parametrize(
    ("name", "blank"),
    [
        ("xsum", {"document": " ", "summary": "a"}),
        ("cnn", {"article": None, "highlights": "a"}),
        ("qa", {"question": "Why?", "passages": [""], "answer": "a"}),
        ("govreport", {"report": "", "summary": "a"}),
    ],
)
def test_empty_documents_are_left_out_and_counted(
    name: str, blank: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    full = {key: value or "Text." for key, value in blank.items()} | {"document": "Text.", "passages": ["Text."]}
    with caplog.at_level(logging.WARNING):
        (sample,) = read(name, write_lines(tmp_path / "a.jsonl", [blank, full]))
    assert sample.passages == ("Text.",)
    assert f"{name}: left out 1 of 2 questions, whose passages are empty" in caplog.text


def row_of(**fields: Any) -> Mapping[str, Any]:
    return {"question": "Why?", "passages": ["Text."], "answer": "a"} | fields


def test_ids(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_lines(tmp_path / "a.jsonl", [row_of(id=7), row_of(question="How?"), row_of(), row_of()])
    with caplog.at_level(logging.WARNING):
        first, other, plain, again = (sample.id for sample in read("qa", path))
    assert first == "7" and len(plain) == 16 and again == f"{plain}-1" and len({first, other, plain}) == 3
    assert "qa: 1 questions repeat earlier ones about the same passage" in caplog.text
    # The hash depends on question and passage alone: not on place, file or answer.
    moved = write_lines(tmp_path / "b.jsonl", [row_of(answer=["b"]), row_of(question="How?")])
    assert [sample.id for sample in read("qa", moved)] == [plain, other]
    with pytest.raises(DataError, match=r"line 2: the id 7 occurs a second time.*after .*line 1. Remove one"):
        read("qa", write_lines(tmp_path / "c.jsonl", [row_of(id=7), row_of(id="7", question="How?")]))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "squad",
            {"text": "a", "label": 1},
            r"found the fields label, text; wanted those of .*original: data; rows: que",
        ),
        ("qa", {"question": "Why?"}, r"found the fields question; wanted .*answer or answers"),
        ("qa", {}, r"found the fields none; wanted"),
        ("xsum", {"article": "a"}, r"found the fields article; wanted .*Hub: document, summary"),
        ("qasper", {"input": "no empty line", "output": "a"}, r"no empty line"),
        ("qa", row_of(answer=3), r"expected answers as texts.*got int"),
        ("qa", row_of(passages=[{"body": "a"}]), r"expected passages as texts.*fields \['body'\]"),
        ("qa", row_of(question=5), r"expected the question as a text, got int"),
        ("qa", row_of(question=" "), r"expected the question as a text, got none"),
        ("qa", row_of(id={"a": 1}), r"expected the id as a text or a number, got dict"),
        ("squad", {"data": [{"paragraphs": [{"qas": [{"answers": []}]}]}]}, r"layout original \(the field 'id'"),
        ("squad2", {"data": [{"paragraphs": [{"qas": [{"id": "a"}]}]}]}, r"layout original \(the field 'answers'"),
        ("qa", row_of(answer=" "), r"found 1 questions, none with an answer"),
        ("qa", row_of(question="\ud800"), r"UTF-8 cannot encode"),
        ("qa", row_of(id="\ud800"), r"UTF-8 cannot encode"),
        ("cnn", {"article": ["a"], "highlights": "b"}, r"layout Hub: expected texts as passages, got list"),
        ("xsum", {"document": "a", "summary": None}, r"found 1 questions, none with an answer"),
        ("qa", [1], r"value 1: expected a JSON object, got int"),
    ],
)
def test_another_layout_is_one_error_with_the_fields_found_and_wanted(
    name: str, content: Any, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=words):
        read(name, path)


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing.jsonl does not exist"):
        read("qa", tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match=r"holds no file of JSON"):
        read("qa", tmp_path / "a")

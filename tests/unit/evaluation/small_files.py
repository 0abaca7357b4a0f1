"""Small files in the original formats of the evaluation's data sets. Their texts are made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

CITIES = (("Orva", "the Lisk", "1204"), ("Tallen", "the Umber", "1377"), ("Quay", "the Sen", "1610"))
PARAGRAPHS = tuple(f"{city} lies on {river}. It was founded in {year}." for city, river, year in CITIES)
QUESTIONS = tuple(f"Which river flows through {city}?" for city, _, _ in CITIES)
RIVERS = tuple(river for _, river, _ in CITIES)


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], *, flatten: bool = False) -> Path:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(list(rows))
    pyarrow.parquet.write_table(table.flatten() if flatten else table, path)
    return path


def write_texts(folder: Path, texts: Mapping[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def nq(folder: Path) -> Path:
    answers = [[river, river.removeprefix("the ")] for river in RIVERS]
    rows = zip(QUESTIONS, PARAGRAPHS, answers, strict=True)
    return write_lines(
        folder / "nq.jsonl",
        [{"question": q, "passages": [p, "Another passage."], "answer": a} for q, p, a in rows],
    )


def triviaqa_rows() -> list[dict[str, Any]]:
    return [
        {
            "question_id": f"tc_{idx}",
            "question": question,
            "entity_pages": {"title": ["A"], "wiki_context": [paragraph]},
            "search_results": {"title": ["B", "C"], "search_context": ["web page", ""]},
            "answer": {"value": river, "aliases": [river.upper(), river], "normalized_aliases": ["x"]},
        }
        for idx, (question, paragraph, river) in enumerate(zip(QUESTIONS, PARAGRAPHS, RIVERS, strict=True))
    ]


def triviaqa(folder: Path) -> Path:
    return write_parquet(folder / "triviaqa.parquet", triviaqa_rows())


def hotpotqa_rows() -> list[dict[str, Any]]:
    context = [[city, [f"{city} lies on {river}.", f" It was founded in {year}."]] for city, river, year in CITIES]
    return [
        {"_id": f"h{idx}", "question": question, "answer": river, "context": context, "supporting_facts": [["Quay", 0]]}
        for idx, (question, river) in enumerate(zip(QUESTIONS, RIVERS, strict=True))
    ]


def hotpotqa(folder: Path) -> Path:
    return write_json(folder / "hotpot.json", hotpotqa_rows())


def squad(folder: Path) -> Path:
    paragraphs = [
        {
            "context": paragraph,
            "qas": [
                {"id": f"s{idx}", "question": f" {question}", "answers": [{"text": river}, {"text": f"{river} river"}]},
                {"id": f"u{idx}", "question": "Who fled?", "answers": [], "is_impossible": True},
            ],
        }
        for idx, (question, paragraph, river) in enumerate(zip(QUESTIONS, PARAGRAPHS, RIVERS, strict=True))
    ]
    articles = [{"title": "Rivers", "paragraphs": paragraphs[:2]}, {"title": "Quay", "paragraphs": paragraphs[2:]}]
    return write_json(folder / "squad.json", {"version": "v2.0", "data": articles})


FLORES = {
    "eng_Latn": ("One boat.", "Two boats.", "Three boats."),
    "spa_Latn": ("Un barco.", "Dos barcos.", "Tres barcos."),
    "fra_Latn": ("Un bateau.", "Deux bateaux.", "Trois bateaux."),
    "deu_Latn": ("Ein Boot.", "Zwei Boote.", "Drei Boote."),
    "dan_Latn": ("En båd.", "To både.", "Tre både."),
}


def flores(folder: Path) -> Path:
    for code, texts in FLORES.items():
        write_lines(folder / "flores" / f"{code}.jsonl", [{"text": text} for text in texts])
    return folder / "flores"


def cnn(folder: Path) -> Path:
    rows = [{"article": p, "highlights": f"{r} .\nA city .", "id": r} for p, r in zip(PARAGRAPHS, RIVERS, strict=True)]
    return write_parquet(folder / "cnn.parquet", rows)


def xsum(folder: Path) -> Path:
    rows = [{"document": p, "summary": f"A city on {r}.", "id": r} for p, r in zip(PARAGRAPHS, RIVERS, strict=True)]
    return write_lines(folder / "xsum.jsonl", rows)


def narrativeqa(folder: Path) -> Path:
    story = {"id": "d1", "kind": "movie", "text": "A ferryman\nloses his boat."}
    rows = [
        {"document": story, "question": {"text": q}, "answers": [{"text": "A ferryman"}, {"text": "a man"}]}
        for q in ("Who loses a boat?", "Who is the hero?")
    ]
    return write_parquet(folder / "narrativeqa.parquet", rows)


def qasper_answer(**fields: Any) -> dict[str, Any]:
    nothing = {"unanswerable": False, "extractive_spans": [], "yes_no": None, "free_form_answer": "", "evidence": []}
    return {"answer": nothing | fields, "annotation_id": "a", "worker_id": "w"}


def qasper_papers() -> dict[str, Any]:
    answers = [
        qasper_answer(extractive_spans=["two tides", "one moon"]),
        qasper_answer(free_form_answer="Tides."),
        qasper_answer(unanswerable=True),
        qasper_answer(yes_no=False),
    ]
    return {
        "1705.09665": {
            "title": "On Tides",
            "abstract": "We count tides.",
            "full_text": [{"section_name": "Data", "paragraphs": ["Two tides.", "One moon."]}],
            "qas": [{"question": "What is counted?", "question_id": "q1", "answers": answers}],
        }
    }


def qasper(folder: Path) -> Path:
    return write_json(folder / "qasper.json", qasper_papers())


def govreport(folder: Path) -> Path:
    inner = {"section_title": "Costs", "paragraphs": ["They rose."], "subsections": []}
    report = [{"section_title": "Dams", "paragraphs": ["Dams age.", "Some leak."], "subsections": [inner]}]
    highlight = [{"section_title": "What GAO Found", "paragraphs": ["Dams leak."], "subsections": []}]
    return write_json(folder / "GAO-1.json", {"id": "GAO-1", "report": report, "highlight": highlight})


def qmsum(folder: Path) -> Path:
    meeting = {
        "meeting_transcripts": [{"speaker": "A", "content": "Boats?"}, {"speaker": "B", "content": "Two."}],
        "general_query_list": [{"query": "Summarize the meeting.", "answer": "They count boats."}],
        "specific_query_list": [{"query": "What did B say?", "answer": "Two.", "relevant_text_span": [["1", "1"]]}],
    }
    return write_lines(folder / "val.jsonl", [meeting])


def haystack(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "haystack.yaml"
    path.write_text("{words: [60], samples: 2, needles: 2, seed: 3}", encoding="utf-8")
    return path


def own(folder: Path) -> Path:
    rows = zip(QUESTIONS, PARAGRAPHS, RIVERS, strict=True)
    return write_lines(folder / "own.jsonl", [{"question": q, "passages": p, "answer": r} for q, p, r in rows])


WRITERS: dict[str, Callable[[Path], Path]] = {
    "nq": nq,
    "triviaqa": triviaqa,
    "hotpotqa": hotpotqa,
    "squad": squad,
    "squad2": squad,
    "flores": flores,
    "cnn": cnn,
    "xsum": xsum,
    "narrativeqa": narrativeqa,
    "qasper": qasper,
    "govreport": govreport,
    "qmsum": qmsum,
    "needle": haystack,
    "multi_needle": haystack,
    "variables": haystack,
    "counting": haystack,
    "qa": own,
    "summary": own,
    "translation": own,
}

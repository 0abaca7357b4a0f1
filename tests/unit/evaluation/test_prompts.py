"""Prompts: golden texts of every task, the reference's choice of examples, and no prompt with its own answer."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from arc_ds.errors import ConfigError, DataError
from arc_ds.evaluation.datasets import TASKS
from arc_ds.evaluation.prompts import make_prompts, reference_order
from arc_ds.evaluation.protocol import CLEAN, REFERENCE
from arc_ds.evaluation.sample import Document, EvalPrompt, EvalSample, Said
from tests.unit.evaluation.small_files import WRITERS

GOLDEN = Path(__file__).parent / "golden_prompts.txt"
SAMPLES = [
    EvalSample(
        id=f"q{idx}", task="nq", question=f"Question {idx}?", passages=(f"Text {idx}.",), references=(f"a{idx}",)
    )
    for idx in range(40)
]
OTHERS = [replace(sample, id=f"t{idx}", question=f"Other {idx}?") for idx, sample in enumerate(SAMPLES)]


def show(prompt: EvalPrompt) -> str:
    """The prompt as text, its documents in brackets, and its limits."""
    text = "".join(f"«{part.text}»" if isinstance(part, Document) else part for part in prompt.parts)
    return f"{text}|\n{prompt.sample.id} {prompt.max_new_tokens} {prompt.stop} {prompt.sample.references}"


def golden(name: str) -> dict[str, str]:
    """The golden prompts of a task, by protocol and number of prompts."""
    blocks = (block.partition("\n") for block in GOLDEN.read_text(encoding="utf-8").split("=== ")[1:])
    heads = ((head.partition(": "), text.rstrip()) for head, _, text in blocks)
    return {kind: text for (task, _, kinds), text in heads if task == name for kind in kinds.split(", ")}


def shown(name: str, folder: Path, *, uses_documents: bool) -> dict[str, str]:
    task, texts = TASKS[name], {}
    for protocol in (CLEAN, REFERENCE):
        samples = task.read(WRITERS[name](folder), protocol)
        prompts = make_prompts(task, samples, None, protocol, uses_documents=uses_documents, num_examples=2)
        texts[f"{protocol.name} {len(prompts)}"] = show(prompts[0])
    return texts


@pytest.mark.parametrize("name", list(TASKS))
def test_prompts_of_every_task_equal_the_golden_texts(name: str, tmp_path: Path) -> None:
    """The golden texts are our own output. They were read one by one against the protocol notes, without the code:

    1.1: the reference's examples are the rows that the swaps of 0.42 give on paper: rows 2 and 0 of three rows (row 1
        is tested), rows 4 and 0 of the six of `squad2`. Examples show their first answer.
    1.2: Document, Question and Answer lines, an empty line between blocks, no space after the last colon; the fixed
        questions of CNN and FLORES; limits of 64 tokens, 256 for CNN.
    1, 9: one reference for NQ and SQuAD, TriviaQA's aliases alone, in the reference; all in clean.
    1.6: HotpotQA's paragraphs are joined by a newline, without titles. SQuAD and CNN have their whole text.
    3: label and document, an empty line, instruction, question, answer label (no question in GovReport); both answers
        of NarrativeQA; Qasper by question (4 references) or by row (4 samples); no stop but the end of text in the
        reference. The labels' own lines are ZeroSCROLLS's form, which the notes name as the source.
    The clean choice of examples has no oracle. Its examples are of the file, and none is the tested sample.
    """
    expected = golden(name)
    assert len(expected) == 2 and shown(name, tmp_path, uses_documents=True) == expected
    closed = {kind: re.sub(r"\w+:\s«[^»]*»\n+", "", text) for kind, text in expected.items()}
    assert all("«" in text for text in expected.values()) and "«" not in str(closed)
    if TASKS[name].layout == "blocks":  # section 2: a newline precedes the test block
        kind = next(kind for kind in closed if kind.startswith("reference"))
        examples, _, test = closed[kind].rpartition("Question:")
        closed[kind] = f"{examples}\nQuestion:{test}"
    assert shown(name, tmp_path, uses_documents=False) == closed


def shuffled(rows: list[EvalSample]) -> list[EvalSample]:
    """Notes, section 1.1: for i from n-1 down to 1, swap the places i and floor(0.42 (i+1))."""
    rows = list(rows)
    for i in reversed(range(1, len(rows))):
        j = 42 * (i + 1) // 100
        rows[i], rows[j] = rows[j], rows[i]
    return rows


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_the_reference_s_prompts_are_those_of_the_notes(count: int, closed: bool) -> None:
    """The prompts of all tested questions, written anew from the notes: 1.1 (examples), 1.2 (blocks), 2 (closed)."""
    order = shuffled(SAMPLES)
    blocks = [
        f"{'' if closed else f'Document: «{each.passages[0]}»' + chr(10)}Question: {each.question}\nAnswer:"
        for each in order
    ]
    before = "".join(
        f"{block} {example.references[0]}\n\n" for block, example in zip(blocks[:count], order, strict=False)
    )
    extra = "\n" if closed else ""  # a newline precedes the question of the test block
    expected = {each.id: f"{before}{extra}{block}" for each, block in zip(order, blocks, strict=True)}
    tested = [each.id for each in order[count:]]
    for limit in (None, 7):
        found = make_prompts(
            TASKS["nq"], SAMPLES, None, REFERENCE, uses_documents=not closed, num_examples=count, limit=limit
        )
        wanted = tested[::-1][:limit]  # the remaining list is reversed, and its first n are tested
        assert {prompt.sample.id: show(prompt).rpartition("|")[0] for prompt in found} == {
            name: expected[name] for name in wanted
        }


@pytest.mark.parametrize(
    ("count", "rows"),
    [
        (3610, [1564, 0, 2883, 1, 1954]),  # NQ
        (11313, [8864, 0, 6864, 1, 11076]),  # TriviaQA
        (11490, [8864, 0, 6864, 1, 11076]),  # CNN
        (10570, [8864, 0, 6864, 1, 4652]),  # SQuAD
        (7405, [3723, 0, 6864, 1, 4652]),  # HotpotQA
        (997, [657, 0, 509, 1, 821]),  # FLORES dev
    ],
)
def test_the_reference_takes_its_golden_rows_as_examples(count: int, rows: list[int]) -> None:
    order = reference_order(count)
    assert order[:5] == rows and sorted(order) == list(range(count))


def ids_of(prompts: Sequence[EvalPrompt]) -> list[str]:
    return [prompt.sample.id for prompt in prompts]


def test_the_reference_tests_the_last_questions_first_but_translations_in_order(
    caplog: pytest.LogCaptureFixture,
) -> None:
    order = [f"q{idx}" for idx in reference_order(40)]
    prompts = make_prompts(TASKS["nq"], SAMPLES, OTHERS, REFERENCE)
    assert set(ids_of(prompts)) == set(order[5:]) and not caplog.records
    prompts = make_prompts(TASKS["nq"], SAMPLES, OTHERS, REFERENCE, limit=4)
    assert set(ids_of(prompts)) == set(order[-4:])
    prompts = make_prompts(TASKS["flores"], SAMPLES, None, REFERENCE, limit=4)
    assert set(ids_of(prompts)) == set(order[5:9])
    assert ids_of(prompts) == sorted(ids_of(prompts), key=lambda name: int(name[1:]))
    prompts = make_prompts(TASKS["qasper"], SAMPLES, None, REFERENCE, limit=4)
    assert set(ids_of(prompts)) == set(order[:4])


def test_examples_of_another_split_are_the_same_for_all_samples_and_follow_from_the_seed() -> None:
    def prefixes(seed: int) -> set[str]:
        prompts = make_prompts(TASKS["nq"], SAMPLES, OTHERS, CLEAN, num_examples=3, seed=seed)
        assert ids_of(prompts) == [sample.id for sample in SAMPLES]
        return {show(prompt).rsplit("\n\nDocument", 1)[0] for prompt in prompts}

    assert len(prefixes(0)) == 1 and prefixes(0) == prefixes(0) != prefixes(1)
    assert all(prefix.count("Other") == 3 for prefix in prefixes(0))
    few = [ids_of(make_prompts(TASKS["nq"], SAMPLES, OTHERS, CLEAN, limit=5, seed=seed)) for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2] and all(ids != [f"q{idx}" for idx in range(5)] for ids in few)


def test_examples_per_sample_differ_and_need_a_split() -> None:
    protocol = replace(CLEAN, examples="per_sample")
    prompts = make_prompts(TASKS["nq"], SAMPLES, OTHERS, protocol, num_examples=5)
    heads = [show(prompt).rsplit("\n\nDocument", 1)[0] for prompt in prompts]
    assert len(set(heads)) == len(SAMPLES) and all(len(set(head.split("\n\n"))) == 5 for head in heads)
    with pytest.raises(ConfigError, match="Pass that split's file"):
        make_prompts(TASKS["nq"], SAMPLES, None, protocol)


@pytest.mark.parametrize("protocol", [CLEAN, replace(CLEAN, examples="per_sample")])
def test_examples_that_ask_what_a_sample_asks_are_not_drawn(protocol: object, caplog: pytest.LogCaptureFixture) -> None:
    same_passage = replace(SAMPLES[0], id="x", references=("other",))
    same_answer = replace(SAMPLES[1], id="y", passages=("Other text.",), question="QUESTION 1?", references=("A1",))
    pool = [same_passage, same_answer, *OTHERS[:5]]
    with caplog.at_level(logging.WARNING):
        prompts = make_prompts(TASKS["nq"], SAMPLES, pool, protocol, num_examples=5)  # type: ignore[arg-type]
    assert all(show(prompt).count("Other") == 5 for prompt in prompts)
    assert "2 of 7 samples for in-context examples ask what a tested sample asks" in caplog.text
    with pytest.raises(DataError, match="expected 6 in-context examples, found 5"):
        make_prompts(TASKS["nq"], SAMPLES, pool, protocol, num_examples=6)  # type: ignore[arg-type]


@pytest.mark.parametrize("protocol", [CLEAN, REFERENCE])
def test_a_sample_that_asks_what_an_example_of_its_file_asks_is_left_out(
    protocol: object, caplog: pytest.LogCaptureFixture
) -> None:
    doubled = [*SAMPLES, *(replace(sample, id=f"again-{sample.id}") for sample in SAMPLES)]
    with caplog.at_level(logging.WARNING):
        prompts = make_prompts(TASKS["nq"], doubled, None, protocol, num_examples=20, limit=40)  # type: ignore[arg-type]
    assert len(prompts) == 40  # those that are left out do not count
    for prompt in prompts:
        assert show(prompt).count(prompt.sample.question or "") == 1
    assert "samples that ask what one of their in-context examples asks" in caplog.text


def test_directions_have_the_same_examples_and_tested_sentences(tmp_path: Path) -> None:
    samples = [
        replace(sample, id=f"{group}-{sample.id}", group=group, cluster=sample.id)
        for group in ("eng-fra", "eng-deu")
        for sample in SAMPLES
    ]
    for protocol in (CLEAN, REFERENCE):
        prompts = make_prompts(TASKS["flores"], samples, None, protocol, limit=7)
        french, german = ([p.sample.cluster for p in prompts if p.sample.group == g] for g in ("eng-fra", "eng-deu"))
        assert french == german and len(french) == 7
        assert [part for part in prompts[0].parts[:-2]] == [part for part in prompts[7].parts[:-2]]
    pool = [replace(sample, passages=("Andere.",), references=(sample.group,)) for sample in samples]
    for prompt in make_prompts(TASKS["flores"], samples, pool, CLEAN, limit=3):
        assert show(prompt).count(f"Answer: {prompt.sample.group}\n\n") == 5


def test_documents_are_stripped_and_joined_passages() -> None:
    sample = replace(SAMPLES[0], passages=(" one \n", "two", "three"))
    (prompt,) = make_prompts(TASKS["nq"], [sample], None, CLEAN, num_examples=0, num_passages=2)
    assert prompt.parts == ("Document: ", Document("one\ntwo"), "\nQuestion: Question 0?\n", Said("Answer:"))
    assert isinstance(prompt.parts[-1], Said) and not isinstance(prompt.parts[-2], Said)
    assert prompt.max_new_tokens == 64 and prompt.stop == ("\n\n",)


def test_blank_lines_in_answers_of_examples_are_left_out() -> None:
    """A blank line ends an answer, in generation and in training (`data/tasks/questions.py`)."""
    samples = [replace(sample, references=("one\n \n\ntwo",)) for sample in SAMPLES[:2]]
    (prompt,) = make_prompts(TASKS["nq"], samples, None, CLEAN, num_examples=1)
    assert show(prompt).count("Answer: one\ntwo\n\nDocument") == 1 and prompt.sample.references == ("one\n \n\ntwo",)


def test_an_instruction_of_the_file_is_written_as_it_stands() -> None:
    for instruction, written in (("Do it.\n", "Do it.\n"), ("Do it.", "Do it.\n\n")):
        sample = replace(SAMPLES[0], instruction=instruction)
        (prompt,) = make_prompts(TASKS["qmsum"], [sample], None, CLEAN)
        assert show(prompt).startswith(f"Transcript:\n«Text 0.»\n\n{written}Query:\nQuestion 0?\n\nAnswer:\n|")


def test_a_sample_or_an_example_without_a_question_is_refused() -> None:
    for samples, examples in (([replace(SAMPLES[0], question="")], None), (SAMPLES, [replace(OTHERS[0], question="")])):
        with pytest.raises(DataError, match="nq: 1 samples have no question: [qt]0"):
            make_prompts(TASKS["nq"], samples, examples, CLEAN, num_examples=0)
    (prompt,) = make_prompts(TASKS["govreport"], [replace(SAMPLES[0], question=None)], None, CLEAN)
    assert show(prompt).startswith("Report:\n«Text 0.»\n\nSummarize the report in one page.\n\nSummary:\n|")


@pytest.mark.parametrize(("name", "num_read"), [("nq", 1), ("hotpotqa", 3), ("cnn", 3), ("qmsum", 3), ("qa", 3)])
def test_only_questions_with_retrieved_passages_read_the_first_one(name: str, num_read: int) -> None:
    sample = replace(SAMPLES[0], passages=("one", "two", "three"))
    (prompt,) = make_prompts(TASKS[name], [sample], None, CLEAN, num_examples=0)
    assert Document("\n".join(sample.passages[:num_read])) in prompt.parts


def test_a_sample_without_passages_can_be_asked_closed_book_only() -> None:
    samples = [replace(sample, passages=()) for sample in SAMPLES]
    (prompt, *_) = make_prompts(TASKS["nq"], samples, None, CLEAN, uses_documents=False)
    assert show(prompt).count("Question:") == 6 and all(isinstance(part, str) for part in prompt.parts)
    with pytest.raises(DataError, match="40 samples have no passage: q0, q1.*or evaluate closed-book"):
        make_prompts(TASKS["nq"], samples, None, CLEAN)
    with pytest.raises(DataError, match="40 samples have no passage"):
        make_prompts(TASKS["nq"], SAMPLES, samples, CLEAN)

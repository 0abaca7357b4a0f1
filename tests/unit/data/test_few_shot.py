"""Few-shot samples, decoded to text, match the paper's templates (appendix C), and every cut is counted."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arc_ds.data.tasks import TaskCounts, closed, mismatched, open_
from arc_ds.data.tasks.chat import PLAIN
from arc_ds.errors import DataError
from arc_ds.tokenizers import load_tokenizer
from tests.helpers.written import written
from tests.unit.data.examples import Pair, check_targets, context_ids, example_of, golden_case, text_ids, text_of

TOWER = {"passage": "The tower is of stone.", "question": "Of what is the tower?", "answer": "stone"}
LAMP = {"passages": ["The lamp held."], "question": "What held?", "answer": "The lamp."}
SEA = {
    "passages": "Wind from the sea.",
    "instruction": "Translate the previous document into Spanish.",
    "answer": "Viento.",
}


make = partial(example_of, task="few_shot")
text_of = partial(text_of, task="few_shot")


def test_in_context_examples_stand_in_front_and_only_the_last_answer_is_a_target(pair: Pair) -> None:
    """Each block's document is compressed. A translation has its instruction as the question."""
    assert text_of(pair, SEA, TOWER, LAMP) == (
        "<s>Document: ⟦The tower is of stone.<cont>⟧\nQuestion: Of what is the tower?\nAnswer: stone\n\n"
        "Document: ⟦The lamp held.<cont>⟧\nQuestion: What held?\nAnswer: The lamp.\n\n"
        "Document: ⟦Wind from the sea.<cont>⟧\nQuestion: Translate the previous document into Spanish.\n"
        "Answer:‹ Viento.\n\n›"
    )


def test_record_without_question_has_no_question_line(pair: Pair) -> None:
    bare = {"passage": "The lamp held.", "answer": "It held.", "question": ""}
    block = "Document: ⟦The lamp held.<cont>⟧\nAnswer:"
    assert text_of(pair, bare) == f"<s>{block}‹ It held.\n\n›"
    assert text_of(pair, bare, bare, bos=False) == f"{block} It held.\n\n{block}‹ It held.\n\n›"
    assert written(closed(make(pair, bare)), *pair) == "<s>Answer:‹ It held.\n\n›"


def test_variants_of_the_template(pair: Pair) -> None:
    """`closed` omits the document lines. `open` has the text in place of the context."""
    example = make(pair, TOWER, LAMP, markers=frozenset())
    target = "Question: Of what is the tower?\nAnswer:‹ stone\n\n›"
    assert written(closed(example), *pair) == f"<s>Question: What held?\nAnswer: The lamp.\n\n{target}"
    assert written(open_(example), *pair) == (
        "<s>Document: The lamp held.\nQuestion: What held?\nAnswer: The lamp.\n\n"
        f"Document: The tower is of stone.\n{target}"
    )
    assert example.contexts == ("The lamp held.", "The tower is of stone.")
    twin = make(pair, TOWER, markers=frozenset())
    others = mismatched([example, twin, make(pair, SEA, TOWER, markers=frozenset())])
    assert written(others[0], *pair) == (
        "<s>Document: ⟦The lamp held.⟧\nQuestion: What held?\nAnswer: The lamp.\n\n"
        f"Document: ⟦Wind from the sea.⟧\n{target}"
    )


def test_open_variant_is_the_decoder_s_own_reading_of_the_whole_text(pair: Pair, golden: Path) -> None:
    for decoder in (pair[1], load_tokenizer(golden / "tokenizers" / "sp384.model")):
        ids = text_ids(open_(make((pair[0], decoder), TOWER, LAMP, SEA)))
        whole = decoder.decode(ids)
        assert whole.startswith("Document: The lamp held.\nQuestion: What held?\nAnswer: The lamp.\n\nDocument: Wind")
        assert ids == [decoder.bos_id, *decoder.encode(whole)]


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({"question": " What held? "}, "Question: What held?\n"),
        ({"instruction": "Say it."}, "Question: Say it.\n"),
        ({"instruction": "In a word:", "question": "What held?"}, "Question: In a word: What held?\n"),
        ({"instruction": "Say {question} aloud", "question": "What?"}, "Question: Say What? aloud\n"),
        ({"instruction": "Text||Say {question}.||It says", "question": "What?"}, "Question: What?\n"),
        ({"instruction": "Text||Say it. {question}||It says"}, "Question: Say it.\n"),
        ({"instruction": "||{question}||"}, ""),
    ],
)
def test_what_is_asked(pair: Pair, fields: dict, asked: str) -> None:
    record = {"passage": "The lamp held.", "answer": "It."} | fields
    assert text_of(pair, record, bos=False) == f"Document: ⟦The lamp held.<cont>⟧\n{asked}Answer:‹ It.\n\n›"


def test_number_of_passages_and_answer_are_drawn_from_the_seed(pair: Pair) -> None:
    record = {"passages": ["One é.", "Two.", "Three.", "Four."], "question": "Which?", "answer": ["x", "y"]}
    drawn = {(make(pair, record, seed=seed, max_passages=3).contexts, text_of(pair, record, seed=seed)[-5:-3])
             for seed in range(60)}  # fmt: skip
    assert drawn == {
        ((passages,), f" {answer}")
        for passages in ("One é.", "One é.\nTwo.", "One é.\nTwo.\nThree.")
        for answer in ("x", "y")
    }
    example = make(pair, record, max_passages=9, seed=8)
    assert [pair[0].decode(ids) for ids in context_ids(example.sample)] == [example.contexts[0]]


def test_document_is_cut_to_the_limit_and_counted(pair: Pair) -> None:
    long = TOWER | {"passages": ["é" * 40, "the sea"], "passage": None}
    for limit in (7, 8):  # é has two tokens
        example = make(pair, long, max_documents=limit, max_passages=1)
        assert example.contexts == ("é" * (limit // 2),)
        assert example.counts == TaskCounts(cut_contexts=1)
        assert example.sample.num_context_tokens == 2 * (limit // 2)
    whole = make(pair, long, max_documents=80, max_passages=1)
    assert (whole.contexts, whole.counts) == (("é" * 40,), TaskCounts())
    with pytest.raises(DataError, match=r"no character that fits 1 tokens.*max_documents_tokens"):
        make(pair, long, max_documents=1)


def test_examples_without_room_are_left_out_from_the_first_on(pair: Pair) -> None:
    records = [TOWER | {"passage": text, "answer": text} for text in ("own", "aaa", "bbbb", "cc")]
    sizes = [len(pair[0].encode(record["passage"])) for record in records]
    for limit, kept in ((sum(sizes), ("aaa", "bbbb", "cc")), (sum(sizes) - 1, ("bbbb", "cc")), (sizes[0], ())):
        example = make(pair, *records, max_documents=limit)
        assert example.contexts == (*kept, "own")
        assert example.counts.cut_examples == 3 - len(kept)
    blocked = [records[0], records[1], TOWER | {"passage": "x" * 99}, records[3]]
    assert make(pair, *blocked, max_documents=20).contexts == ("cc", "own")


def test_question_and_answer_too_long_are_cut_and_counted(pair: Pair) -> None:
    record = {"passage": "The lamp held.", "question": "ü" * 9 + "x?", "answer": "ü" * 9}
    example = make(pair, record, max_question=5, max_answer=5)
    assert len(pair[1].encode("ü")) == 2
    text = written(example.sample, *pair)
    assert text == "<s>Document: ⟦The lamp held.<cont>⟧\nQuestion: üx?\nAnswer:‹ üü›"
    assert example.counts == TaskCounts(cut_questions=1, cut_answers=1)
    as_example = make(pair, TOWER, record, max_question=16, max_answer=5)
    assert as_example.contexts == ("The tower is of stone.",)
    assert as_example.counts == TaskCounts(cut_examples=1)
    with pytest.raises(DataError, match=r"no character that fits 1 tokens.*max_answer_tokens"):
        make(pair, record, max_answer=1)


@given(text=st.text(st.characters(max_codepoint=127), max_size=40))
def test_an_ascii_text_has_a_token_a_character_and_one_at_most(pair: Pair, golden: Path, text: str) -> None:
    """So a short question is within its limit, without tokenising it."""
    for tokenizer in (*pair, load_tokenizer(golden / "tokenizers" / "sp384.model")):
        assert len(tokenizer.encode(text)) <= len(text) + 1


def test_text_that_looks_like_the_template_changes_nothing(pair: Pair) -> None:
    """The reference searches the prompt for its blocks, and loses count of the documents (oddity 30)."""
    trap = "x\n\nDocument: y\nQuestion: z\nAnswer: w"
    record = {"passage": trap, "question": trap, "answer": trap}
    example = make(pair, record, record)
    kinds = [segment.kind for segment in example.sample.segments]
    assert kinds == ["text", "context", "text", "context", "text", "text"]
    assert example.contexts == (trap, trap)
    assert pair[1].decode(list(example.sample.segments[-1].ids)) == " x\nDocument: y\nQuestion: z\nAnswer: w\n\n"


def test_each_decoder_reads_the_same_text_in_its_own_tokens(pair: Pair, golden: Path) -> None:
    """The reference decodes one decoder's tokens for the other, drops texts of one token, and trains on in-context
    answers (oddity 47)."""
    other = load_tokenizer(golden / "tokenizers" / "sp384.model")
    short = {"passage": "a", "question": "b", "answer": "c"}
    for seed in range(4):
        record = TOWER | {"answer": ["stone", "of stone", "grey"]}
        examples = [make((pair[0], decoder), record, short, TOWER, seed=seed) for decoder in (pair[1], other)]
        texts = [decoder.decode(text_ids(e.sample)) for e, decoder in zip(examples, (pair[1], other), strict=True)]
        assert texts[0] == texts[1]
        assert "Document: \nQuestion: b\nAnswer: c\n\n" in texts[0]
        assert examples[0].contexts == examples[1].contexts


def test_faulty_records_are_named(pair: Pair) -> None:
    with pytest.raises(DataError, match=r"'answer', got the fields"):
        make(pair, {"passage": "a", "question": "b"})
    with pytest.raises(DataError, match="`passages`"):
        make(pair, TOWER, {"text": "a"})
    with pytest.raises(DataError, match=r"got 2 parts: 'a\|\|b'.*twice, or not at all"):
        make(pair, TOWER | {"instruction": "a||b"})


RECORDS = st.fixed_dictionaries(
    {
        "passages": st.lists(
            st.text("the sea.é\n北", min_size=1, max_size=20).filter(str.strip), min_size=1, max_size=3
        ),
        "answer": st.text("of stone. é\n🚲1", min_size=1, max_size=16).filter(str.strip),
    },
    optional={"question": st.text("Whose? é\n", max_size=16), "instruction": st.just("Answer in 1 word: {question}")},
)
SEEDS = st.integers(0, 2**64 - 1)


@given(records=st.lists(RECORDS, min_size=1, max_size=4), seed=SEEDS, size=st.integers(8, 60))
def test_every_label_is_the_next_token_and_variants_share_targets(
    pair: Pair, records: list[dict], seed: int, size: int
) -> None:
    sizes = {"max_documents": size, "max_answer": 12, "max_question": 12, "max_passages": 2}
    example = make(pair, *records, seed=seed, **sizes)
    assert example == make(pair, *records, seed=seed, **sizes)
    assert pair[1].decode(check_targets(example).labels.tolist()).startswith(" ")
    assert example.sample.num_context_tokens <= size
    assert len(example.contexts) + example.counts.cut_examples == len(records)


@given(answer=st.text("of stone. é\n🚲1", min_size=1, max_size=16).filter(str.strip))
def test_labels_spell_the_answer_and_its_end(pair: Pair, answer: str) -> None:
    labels = check_targets(make(pair, TOWER | {"answer": answer})).labels.tolist()
    written_answer = re.sub(r"\n\s*\n", "\n", answer.strip())
    assert pair[1].decode(labels) == f" {written_answer}\n\n"


@pytest.mark.parametrize("lines", ["stone\n\nand wood", "stone\n \t\n\n\nand wood", "stone\r\n\r\nand wood"])
def test_a_blank_line_within_an_answer_is_not_its_end(pair: Pair, lines: str) -> None:
    """Generation stops at the first blank line, as targets and in-context examples show."""
    record = TOWER | {"answer": lines}
    example = make(pair, record, record)
    assert written(example.sample, *pair).replace("\r", "").count("Answer: stone\nand wood\n\n") == 1
    assert pair[1].decode(list(example.sample.segments[-1].ids)).replace("\r", "") == " stone\nand wood\n\n"
    assert example.counts == TaskCounts()
    in_chat = make(pair, record, layout=replace(PLAIN, name="chatml"))
    assert pair[1].decode(check_targets(in_chat).labels.tolist()) == f" {lines}"


def test_mismatched_shares_no_passage_with_the_record_asked_about(pair: Pair) -> None:
    """Records of one page share passages, and each draws a different number of them."""
    pages = [[f"Tower {page} is of stone {row}. " for row in range(3)] for page in range(2)]
    examples = [
        make(pair, TOWER | {"passages": pages[page][::turn], "passage": None}, seed=seed, max_passages=3)
        for page in range(2)
        for seed in range(4)
        for turn in (1, -1)
    ]
    assert len({example.contexts for example in examples}) > 4
    for example, other in zip(examples, mismatched(examples), strict=True):
        (given_ids,) = context_ids(other)
        (page,) = (page for page in pages if page[0] in example.passages)
        assert not any(passage in pair[0].decode(given_ids) for passage in page)


def test_golden_reference_reads_the_same_blocks_but_for_its_double_spaces(golden: Path) -> None:
    """The reference tokenises "…Answer: " and the answer separately, and each stretch after a document as a new text.
    So it feeds two spaces for one in the template (oddity 36), and one more after a document. It ends the answer with
    end-of-text; ours ends with the blank line at which generation stops."""
    item, (encoder, decoder) = golden_case(golden, "instruct_2shot_interleave_tik")
    lines = (golden / "data" / "inputs" / "instruct.jsonl").read_text().splitlines()
    first, second = (json.loads(line) for line in lines[:2])
    second["answer"] = "Once or twice daily"  # drawn by the reference
    example = make((encoder, decoder), second, first)
    start, size = item["sizes"]
    reference = [token for token in item["x"][start : start + size] if token != decoder.bos_id]
    ours = text_ids(example.sample)[1:]
    assert decoder.decode(ours) == decoder.decode(reference).replace(":  ", ": ") + "\n\n"
    contexts = context_ids(example.sample)
    assert contexts == [item["to_embed"][1]["tokens"][0], item["to_embed"][1]["tokens"][1][: len(contexts[1])]]

"""Question-answering pretraining: one passage, its question and answer. Every cut is counted."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from arc_ds.batch.packing import PoolingSpec, pack
from arc_ds.data.loading.estimates import Estimator
from arc_ds.data.tasks import TaskCounts, TaskLimits, mismatched
from arc_ds.data.tasks.registry import all_tasks, find_task
from arc_ds.errors import ConfigError, DataError
from tests.helpers.written import written
from tests.unit.data.examples import Pair, check_targets, example_of, text_of

NAME = "question_answering"
TOWER = {"passages": ["The tower is of stone.", "Each block was marked."], "question": "Which stone?", "answer": "grey"}
LAMP = {"passage": "The lamp held.", "answer": ["It held.", "Held."]}


make = partial(example_of, task=NAME)


def test_a_sample_asks_about_one_passage(pair: Pair) -> None:
    texts = {text_of(pair, TOWER, task=NAME, seed=seed) for seed in range(20)}
    asked = "\nQuestion: Which stone?\nAnswer:‹ grey\n\n›"
    assert texts == {
        f"<s>Document: ⟦The tower is of stone.<cont>⟧{asked}",
        f"<s>Document: ⟦Each block was marked.<cont>⟧{asked}",
    }


def test_a_record_without_a_question_gives_a_paraphrase(pair: Pair) -> None:
    texts = {text_of(pair, LAMP, task=NAME, seed=seed) for seed in range(20)}
    assert texts == {f"<s>Document: ⟦The lamp held.<cont>⟧\nAnswer:‹ {answer}\n\n›" for answer in LAMP["answer"]}


def test_the_loss_is_on_the_answer_alone_and_the_variants_share_it(pair: Pair) -> None:
    example = make(pair, TOWER)
    assert pair[1].decode(check_targets(example).labels.tolist()).strip() == "grey"
    (first, second) = mismatched([example, make(pair, LAMP)])
    assert "The lamp held." in written(first, *pair) and "Which stone?" in written(first, *pair)
    assert "The lamp held." not in written(second, *pair)


def test_what_a_limit_cuts_is_counted(pair: Pair) -> None:
    long_answer = TOWER | {"answer": "grey stone of the sea"}
    counts = make(pair, long_answer, max_context=4, max_answer=2).counts
    assert counts == TaskCounts(cut_contexts=1, cut_answers=1)
    assert not make(pair, TOWER).counts


def test_a_limit_below_one_character_is_named(pair: Pair) -> None:
    with pytest.raises(DataError, match=r"fits 1 tokens\. Raise data\.max_context_tokens\."):
        make(pair, {"passage": "🙂", "answer": "a"}, max_context=1)


def test_the_estimate_is_near_the_sample_and_within_the_largest(pair: Pair) -> None:
    limits = TaskLimits()
    batch = pack([make(pair, LAMP).sample], PoolingSpec())
    record_tokens = len(pair[0].encode(LAMP["passage"])) + 24
    estimate = Estimator(limits, PoolingSpec()).estimate(NAME, [record_tokens])
    assert estimate.context_lengths == (batch.num_encoder_tokens,)
    assert abs(estimate.prefix_rows + estimate.suffix_rows - batch.num_decoder_rows) <= 24
    largest = find_task(NAME).largest(limits, 0, (0, 0, 0))
    assert largest.contexts == 1 and batch.num_encoder_tokens <= largest.context_tokens


def test_it_is_in_the_registry_by_its_file_alone() -> None:
    assert list(all_tasks()) == ["few_shot", "long_context", "pretraining", NAME]


def test_two_tasks_with_one_sample_name_are_both_named(monkeypatch: pytest.MonkeyPatch) -> None:
    task = find_task("long_context")
    monkeypatch.setattr(
        "arc_ds.data.tasks.registry.import_module",
        lambda path: SimpleNamespace(TASK=replace(task, name=path.rpartition(".")[2])),
    )
    with pytest.raises(ConfigError, match="few_shot and long_context both have samples named 'long_context'. Rename"):
        all_tasks.__wrapped__()

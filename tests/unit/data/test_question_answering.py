"""Question-answering pretraining: one passage, its question and answer. Every cut is counted."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from arc_ds.batch.packing import PoolingSpec, pack
from arc_ds.data.loading.estimates import Estimator
from arc_ds.data.tasks import Example, TaskCounts, TaskLimits, closed, make_example, mismatched, open_
from arc_ds.data.tasks.registry import all_tasks, find_task
from arc_ds.errors import ConfigError, DataError
from arc_ds.tokenizers import Tokenizer, load_tokenizer
from tests.helpers.tiny_data import write_json_tokenizer, write_tiktoken
from tests.helpers.written import written

Pair = tuple[Tokenizer, Tokenizer]
NAME = "question_answering"
TOWER = {"passages": ["The tower is of stone.", "Each block was marked."], "question": "Which stone?", "answer": "grey"}
LAMP = {"passage": "The lamp held.", "answer": ["It held.", "Held."]}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Tokenizers of the encoder and the decoder, of different kinds."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return load_tokenizer(write_tiktoken(folder / "t.model")), load_tokenizer(write_json_tokenizer(folder / "json"))


def make(pair: Pair, record: dict, seed: int = 0, **sizes: int) -> Example:
    limits = TaskLimits(**sizes)
    return make_example([record], task=NAME, seed=seed, encoder=pair[0], decoder=pair[1], limits=limits)


def test_a_sample_asks_about_one_passage(pair: Pair) -> None:
    texts = {written(make(pair, TOWER, seed).sample, *pair) for seed in range(20)}
    asked = "\nQuestion: Which stone?\nAnswer:‹ grey\n\n›"
    assert texts == {
        f"<s>Document: ⟦The tower is of stone.<cont>⟧{asked}",
        f"<s>Document: ⟦Each block was marked.<cont>⟧{asked}",
    }


def test_a_record_without_a_question_gives_a_paraphrase(pair: Pair) -> None:
    texts = {written(make(pair, LAMP, seed).sample, *pair) for seed in range(20)}
    assert texts == {f"<s>Document: ⟦The lamp held.<cont>⟧\nAnswer:‹ {answer}\n\n›" for answer in LAMP["answer"]}


def test_the_loss_is_on_the_answer_alone_and_the_variants_share_it(pair: Pair) -> None:
    example = make(pair, TOWER)
    samples = (example.sample, closed(example), open_(example))
    labels = [pack([sample], PoolingSpec()).labels.tolist() for sample in samples]
    assert labels[0] == labels[1] == labels[2] and pair[1].decode(labels[0]).strip() == "grey"
    (first, second) = mismatched([example, make(pair, LAMP)])
    assert "The lamp held." in written(first, *pair) and "Which stone?" in written(first, *pair)
    assert "The lamp held." not in written(second, *pair)


def test_what_a_limit_cuts_is_counted(pair: Pair) -> None:
    long_answer = TOWER | {"answer": "grey stone of the sea"}
    counts = make(pair, long_answer, max_context=4, max_answer=2).counts
    assert counts == TaskCounts(cut_contexts=1, cut_answers=1)
    assert not make(pair, TOWER).counts


def test_a_record_without_an_answer_is_refused(pair: Pair) -> None:
    with pytest.raises(DataError, match="answer"):
        make(pair, {"passage": "The lamp held.", "question": "What?"})


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

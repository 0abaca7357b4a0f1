"""Building the data of all tasks from a config, for training and validation. Nothing is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from arc_ds.config.load import load_config
from arc_ds.errors import ConfigError
from arc_ds.training.build import RunParts, read_parts
from tests.helpers.tiny_mixture import question_records, write_question_shards
from tests.helpers.tiny_run import write_inputs


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    path = write_inputs(folder)
    write_question_shards(folder / "questions", folder / "encoder", question_records(20))
    return path


def read(config: Path, *overrides: str) -> RunParts:
    return read_parts(load_config(config, overrides), torch.device("cpu"))


def sources(config: Path, few_shot: str = "in_context_examples: 2, max_passages: 2") -> str:
    folder = config.parent
    return (
        f"[{{path: {folder}/train, weight: 2}}, {{path: {folder}/questions, task: few_shot, {few_shot}}}, "
        f"{{path: {folder}/train, task: long_context, chunk_tokens: 8}}]"
    )


def test_sources_of_all_tasks_make_batches_and_validation(config: Path) -> None:
    mixture = sources(config)
    parts = read(
        config, f"data.sources={mixture}", f"data.validation={mixture}", "validation.num_samples=16",
        "decoders.0.chat_template=llama2", "data.max_answer_tokens=9", "data.max_chunks=2",
    )  # fmt: skip
    tasks = ("reconstruction", "continuation", "few_shot", "long_context")
    assert parts.data.tasks == tasks
    few_shot, long_context = parts.data.sources[1:]
    assert (few_shot.in_context_examples, few_shot.limits.max_passages, few_shot.limits.max_answer) == (2, 2, 9)
    assert (long_context.limits.chunk_tokens, long_context.limits.max_chunks) == (8, 2)
    made = {task for step in range(6) for micro in parts.data[step].micro_batches for task in micro.batch.tasks}
    assert made == set(tasks)
    assert parts.validator is not None and set(parts.validator.tasks) == set(tasks)
    assert parts.validator.num_samples == 2 * 16
    assert set(parts.inputs.tokenizers) == {"encoder", "decoders.0", "decoders.0.chat_template", "decoders.1"}


def test_too_few_records_for_the_in_context_examples_are_named(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.sources\.1 \(.*/questions\) holds 20 records; .* at least 21"):
        read(config, f"data.sources={sources(config, 'in_context_examples: 20')}")

"""A run on a mixture of all tasks for two decoders, one with a chat template, on two ranks.

Micro-batch limits split the ranks' shares, and the run is stopped halfway and resumed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from arc_ds.launch.exit_codes import EXIT_OK, EXIT_PREEMPTED
from arc_ds.shards.building.writer import build_shards
from tests.helpers.tiny_data import numbered_texts
from tests.helpers.tiny_run import last_logged_step, losses, numbers_by_step, train_on_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 12
TASKS = ("reconstruction", "continuation", "few_shot", "long_context")
DECODERS = ("wide", "other")


@pytest.fixture(scope="module")
def overrides(config: Path) -> list[str]:
    """Overrides that change the tiny run to a mixture of tasks."""
    folder = config.parent
    questions = folder / "questions.jsonl"
    with questions.open("w", encoding="utf-8") as file:
        for number, text in enumerate(numbered_texts(40, sentences=5)):
            record = {
                "passages": [text, f"Nobody lives in tower {number}."],
                "question": "Which tower is it?",
                "answer": [f"Tower {number}", str(number)],
            }
            file.write(json.dumps(record) + "\n")
    build_shards([questions], folder / "questions", folder / "encoder", kind="fine_tuning", shard_bytes=1 << 13)
    pretraining = {"path": str(folder / "train"), "weight": 2}
    few_shot = {"path": str(folder / "questions"), "task": "few_shot", "in_context_examples": 2, "max_passages": 2}
    long_context = {"path": str(folder / "train"), "task": "long_context", "chunk_tokens": 16}
    return [
        f"steps={STEPS}",
        "checkpoint.every=0",
        "validation.every=0",
        "validation.num_samples=12",
        "decoder_schedule=same_batch",
        "micro_batches=1",
        "decoders.1.chat_template=llama2",
        f"data.sources={json.dumps([pretraining, few_shot, long_context])}",
        f"data.validation={json.dumps([few_shot, long_context])}",
        "data.max_documents_tokens=96",
        "data.max_question_tokens=32",
        "data.max_answer_tokens=16",
        "data.max_chunks=8",
        "data.max_encoder_tokens=160",
        "data.max_decoder_rows=600",
    ]


@pytest.fixture(scope="module")
def runs(config: Path, overrides: list[str]) -> tuple[Path, Path]:
    """Two runs: one uninterrupted, one stopped after its third step."""
    whole, stopped = config.parent / "all_tasks", config.parent / "all_tasks_stopped"
    code, console = train_on_ranks(config, [*overrides, f"run_dir={whole}"])
    assert code == EXIT_OK, console
    code, console = train_on_ranks(config, [*overrides, f"run_dir={stopped}"], stop_after=2)
    assert code == EXIT_PREEMPTED and last_logged_step(stopped) == 3, console
    return whole, stopped


def test_every_task_is_trained_and_validated_for_every_decoder(runs: tuple[Path, Path]) -> None:
    numbers = numbers_by_step(runs[0])
    seen = {key for step in numbers.values() for key in step}
    for decoder in DECODERS:
        for task in TASKS:
            assert any(decoder in key and task in key for key in seen if key.startswith("train/")), (decoder, task)
        for task in TASKS[2:]:
            assert any(decoder in key and task in key for key in seen if key.startswith("validation/")), (decoder, task)
    assert all(math.isfinite(value) for step in numbers.values() for key, value in step.items() if "loss" in key)
    assert max(step.get("data/micro_batches", 0) for step in numbers.values()) > 1, "no share was split"


def test_a_mixture_goes_on_from_where_it_was_stopped(
    config: Path, overrides: list[str], runs: tuple[Path, Path]
) -> None:
    whole, stopped = runs
    code, console = train_on_ranks(config, [*overrides, f"run_dir={stopped}"])
    assert code == EXIT_OK, console
    assert losses(stopped) == losses(whole)
    assert numbers_by_step(stopped)[STEPS] == numbers_by_step(whole)[STEPS]

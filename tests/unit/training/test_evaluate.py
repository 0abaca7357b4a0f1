"""The evaluation of a run reads its decoders' files: ends of texts and windows, and the chunks of the run's sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from arc_ds.config.load import load_config
from arc_ds.data.loading.decoder_reader import ReaderFiles
from arc_ds.training.evaluate import Evaluator, open_evaluator
from tests.helpers import fake_eval
from tests.helpers.tiny_run import write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def _open(inputs: Path, *overrides: str) -> Evaluator:
    task = {"name": "qa", "path": str(fake_eval.write_questions(inputs.parent / "q.jsonl", 7)), "num_examples": 2}
    path = inputs.parent / "eval.yaml"
    path.write_text(yaml.safe_dump({"output": "unused", "tasks": [task]}))
    config = load_config(inputs, [f"evaluation={{every: 2, config: {path}}}", *overrides])
    decoders = config.trained_decoders.values()
    files = [ReaderFiles(tokenizer=each.backbone, chat_template=each.chat_template) for each in decoders]
    found = open_evaluator(config, files)
    assert found is not None
    return found


def test_answers_end_as_those_of_eval_run(inputs: Path) -> None:
    file = inputs.parent / "wide" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [7, 9], "max_position_embeddings": 77}))
    wide, other = _open(inputs).readers
    assert wide["stop_ids"] == tuple(sorted({7, 9, wide["tokenizer"].eos_id})) and wide["max_positions"] == 77
    tokenizer = other["tokenizer"]
    turns = [tokenizer.special_ids[name] for name in ("<|eot_id|>", "<|eom_id|>")]
    assert other["stop_ids"] == tuple(sorted([tokenizer.eos_id, *turns])) and other["max_positions"] is None


def test_documents_are_read_in_the_chunks_of_long_context_sources(inputs: Path) -> None:
    assert _open(inputs).chunk_tokens is None
    sources = [{"path": str(inputs.parent / "train"), "task": "long_context", "chunk_tokens": size} for size in (8, 12)]
    assert _open(inputs, f"data.sources={json.dumps(sources)}").chunk_tokens == 12


def test_a_decoder_answers_in_the_turns_of_its_training(inputs: Path) -> None:
    assert [layout.name for layout in _open(inputs).layouts] == ["none", "none"]
    assert [layout.name for layout in _open(inputs, "decoders.1.chat_template=llama2").layouts] == ["none", "llama2"]

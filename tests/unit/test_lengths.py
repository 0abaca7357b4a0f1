"""The longest sequences of a config, task by task."""

from __future__ import annotations

from pathlib import Path

import pytest

from arc_ds.config.lengths import largest_sample, longest_context, longest_sequence
from arc_ds.config.load import load_config
from arc_ds.config.schema import RunConfig

CONFIG = """\
run_dir: runs/x
steps: 2000
encoder: {backbone: models/enc}
decoders: [{name: a, backbone: models/dec}]
pooling: {factors: [4, 2]}
data:
  sources: [{path: a}]
  max_question_tokens: 30
  max_answer_tokens: 20
"""
ASKED = 30 + 20 + 32  # question, answer, and the words around them


def load(tmp_path: Path, *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    return load_config(path, overrides)


FEW_SHOT = "data.sources=[{path: a, task: few_shot, in_context_examples: 3}]"
LONG = "data.sources=[{path: a}, {path: b, task: long_context, chunk_tokens: 512}]"


@pytest.mark.parametrize(
    ("overrides", "context", "rows"),
    [
        ([], 256, 1 + 256 + 256 + 256 // 8 + 2),
        (["data.validation=v"], 256, 1 + 256 + 256 + 256),
        (["data.max_context_tokens=900"], 900, 1 + 900 + 113 + 2),
        ([FEW_SHOT], 2048, 1 + 4 * ASKED + 2048 // 8 + 4 * 2),
        ([LONG], 512, 1 + 256 + 32 * 512 // 8 + 32 * 2),
        ([LONG, "data.validation=[{path: v, task: long_context}]"], 1024, 1 + 256 + 32 * 1024),
        (["pooling.factors=[]", "pooling.memory_tokens=10"], 256, 1 + 512 + 10 + 1),
    ],
    ids=["pretraining", "held out", "reconstruction", "few-shot", "long", "long held out", "memory tokens"],
)
def test_the_longest_sequence_is_that_of_the_longest_task(
    tmp_path: Path, overrides: list[str], context: int, rows: int
) -> None:
    config = load(tmp_path, *overrides)
    assert longest_context(config) == context
    assert longest_sequence(config) == rows


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], (256, 1 + 512 + 32 + 2)),
        ([FEW_SHOT], (2048, 1 + 4 * ASKED + 2048 // 8 + 4 * 2)),
        ([LONG], (32 * 512, 1 + 256 + 32 * 512 // 8 + 32 * 2)),
        ([FEW_SHOT, "pooling.factors=[]", "pooling.memory_tokens=10"], (2048 + 40, 1 + 4 * ASKED + 4 * 11)),
    ],
    ids=["pretraining", "few-shot", "long", "memory tokens of each context"],
)
def test_the_largest_sample_of_a_source_has_all_its_contexts(
    tmp_path: Path, overrides: list[str], expected: tuple[int, int]
) -> None:
    config = load(tmp_path, *overrides)
    assert largest_sample(config, config.data.sources[-1]) == expected

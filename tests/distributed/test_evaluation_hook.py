"""`evaluation` of a run: equal metrics on one and two ranks. One decoder is whole, one partitioned and has adapters.

`test_lockstep.py` shows that an evaluation changes no loss.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from arc_ds.tracking.metrics_log import METRICS_NAME, read_metrics
from tests.helpers import fake_eval
from tests.helpers.tiny_run import train_on_ranks, write_inputs

pytestmark = pytest.mark.distributed

STEPS = 4
SHORT = [
    f"steps={STEPS}",
    "optimizer.warmup_steps=1",
    "checkpoint.every=0",
    "validation.every=0",
    "data.validation=null",
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def questions(inputs: Path) -> Path:
    """Five questions in batches of two or less, answers of up to 6 tokens."""
    folder = inputs.parent / "eval"
    folder.mkdir()
    task = {
        "name": "qa",
        "path": str(fake_eval.write_questions(folder / "questions.jsonl", 7)),
        "num_examples": 2,
        "max_new_tokens": 6,
    }
    path = folder / "eval.yaml"
    path.write_text(yaml.safe_dump({"output": "unused", "tasks": [task], "max_batch_rows": 400}))
    return path


def _evaluated(run: Path) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for entry in read_metrics(run / METRICS_NAME):
        own = {
            name: value for name, value in entry.metrics.items() if name.startswith("eval/") and "seconds" not in name
        }
        if own:
            assert entry.step not in found, f"step {entry.step} was evaluated twice"
            found[entry.step] = own
    return found


def test_metrics_of_the_current_weights_are_equal_on_1_and_2_ranks(
    inputs: Path, questions: Path, tmp_path: Path
) -> None:
    evaluation = f"evaluation={{every: 2, config: {questions}}}"
    placed = [
        *SHORT,
        "decoders.0.placement=zero3",
        "decoders.0.lora.rank=2",
        "decoders.1.chat_template=llama2",
    ]
    found = {}
    for num_ranks in (1, 2):
        run = tmp_path / str(num_ranks)
        code, console = train_on_ranks(inputs, [*placed, f"run_dir={run}", evaluation], num_ranks=num_ranks)
        assert code == 0, console
        found[num_ranks] = _evaluated(run)
    assert found[2].keys() == found[1].keys() == {0, 2, STEPS}
    names = {f"eval/{decoder}/qa/{metric}" for decoder in ("wide", "other") for metric in ("em", "f1", "nll")}
    assert names <= found[2][2].keys() and found[2][2]["eval/wide/qa/num_samples"] == 5
    for step, metrics in found[1].items():
        assert metrics == pytest.approx(found[2][step], rel=1e-4)
    moved = [found[2][step]["eval/wide/qa/nll"] for step in (0, 2, STEPS)]
    assert len(set(moved)) == 3  # the current weights, not those of the start

"""Long documents are shortened to the window by the protocol's rule, between words, and counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from arc_ds.evaluation.config import TaskConfig
from arc_ds.evaluation.datasets import find_task
from arc_ds.evaluation.plan import LoadedTask, make_plan
from arc_ds.evaluation.protocol import CLEAN, REFERENCE
from arc_ds.evaluation.sample import Document, EvalPrompt, EvalSample
from arc_ds.evaluation.shorten import shorten
from arc_ds.evaluation.systems.budget import Part
from arc_ds.evaluation.systems.kind import SystemSettings
from tests.helpers import fake_eval

SAMPLE = EvalSample(id="a", task="govreport", passages=("-",), references=("-",))


def _system(**section: Any) -> fake_eval.Echo:
    settings = SystemSettings(name="echo", protocol=CLEAN, seed=0, device=torch.device("cpu"), dtype=torch.float32)
    return fake_eval.Echo(fake_eval.EchoSection(**section), settings)


def _prompt(words: list[str]) -> EvalPrompt:
    parts = ("Report:\n", Document(" ".join(words)), "\n\nSummarize it. Summary:")
    return EvalPrompt(sample=SAMPLE, parts=parts, max_new_tokens=5, stop=())


@pytest.mark.parametrize("part", get_args(Part))
@pytest.mark.parametrize("length", [300, 5000])
def test_the_kept_part_fills_the_window_and_cuts_no_word(part: Part, length: int) -> None:
    words = [f"{'x' * (idx % 9)}{idx}" for idx in range(length)]
    system, prompt = _system(), _prompt(words)
    shorter = shorten(prompt, system, 200, part)
    assert shorter is not None
    (document,) = (each for each in shorter.parts if isinstance(each, Document))
    kept = document.text.split()
    assert 0.95 * 200 <= system.num_rows(shorter) <= 200
    start = words.index(kept[0])
    assert kept == words[start : start + len(kept)]
    assert {"head": start == 0, "tail": start + len(kept) == length}.get(part, 0 < start < length - len(kept))
    assert shorter.parts[0] == prompt.parts[0] and shorter.parts[2] == prompt.parts[2]


@pytest.mark.parametrize("part", get_args(Part))
def test_a_long_prompt_around_the_document_leaves_it_the_rest(part: Part) -> None:
    """The rows of the prompt do not shrink with the document, so a guess in proportion would never arrive."""
    long_word = "y" * 80
    prompt = _prompt([long_word, *(f"w{idx}" for idx in range(19998)), long_word])
    prompt = replace(prompt, parts=("x " * 950, *prompt.parts))
    fixed = _system().num_rows(prompt) - 20000
    for room in (1, 40):
        found = shorten(prompt, _system(), fixed + room, part)
        assert found is not None and 0.98 * (fixed + room) <= _system().num_rows(found) <= fixed + room


@pytest.mark.parametrize("part", get_args(Part))
def test_a_document_without_white_space_is_cut_anywhere(part: Part) -> None:
    system = _system()
    system.num_rows = lambda prompt: sum(  # type: ignore[method-assign]  # a token a character, as in Chinese
        len(each.text if isinstance(each, Document) else each) for each in prompt.parts
    )
    found = shorten(_prompt(["水" * 3000 + " " + "火" * 3000]), system, 1000, part)
    assert found is not None and 950 <= system.num_rows(found) <= 1000


def test_a_window_that_holds_no_word_is_none() -> None:
    assert shorten(_prompt(["word"] * 50), _system(), 4, "tail") is None


@pytest.mark.parametrize(
    ("protocol", "arc_names", "first_word"),
    [(CLEAN, (), "w70"), (REFERENCE, (), "w70"), (REFERENCE, ("echo",), "w0")],
)
def test_the_plan_shortens_long_tasks_by_the_protocol(
    tmp_path: Path, protocol: Any, arc_names: tuple[str, ...], first_word: str
) -> None:
    """The reference keeps the head for ARC and the tail for the others."""
    text = " ".join(f"w{idx}" for idx in range(100))
    samples = [
        EvalSample(id=name, task="govreport", passages=(passage,), references=("-",))
        for name, passage in (("long", text), ("short", "w1 w2"))
    ]
    task = LoadedTask(
        task=find_task("govreport"),
        config=TaskConfig(name="govreport", path=str(tmp_path), max_new_tokens=5),
        samples=samples,
        examples=None,
    )
    fixed = _system().num_rows(task.prompts(protocol, 0, uses_documents=True)[1]) - 2
    system = _system(window=fixed + 30 + 5)
    plan = make_plan([system], [task], protocol, arc_names=arc_names, seed=0, max_batch_rows=1)
    (long, short) = (planned for batch in plan.batches for planned in batch.prompts)
    (document,) = (each for each in long.prompt.parts if isinstance(each, Document))
    assert document.text.split()[0] == first_word and len(document.text.split()) == 30
    assert long.num_cut > 0 == short.num_cut and long.rows == system.max_rows
    assert plan.summary()["shortened"] == {"echo": {"govreport": 1}} and json.dumps(plan.summary())


@pytest.mark.parametrize("protocol", [CLEAN, REFERENCE])
def test_all_questions_on_a_document_get_the_same_part_of_it(protocol: Any) -> None:
    """So the document is read once for them. The reference cuts it for each question apart."""
    texts = [" ".join(f"{name}{idx}" for idx in range(300)) for name in "ab"]
    samples = [
        EvalSample(
            id=f"{n}", task="narrativeqa", passages=(texts[n % 2],), references=("-",), question="Who? " * (n + 1)
        )
        for n in range(8)
    ]
    config = TaskConfig(name="narrativeqa", path="", max_new_tokens=5)
    task = LoadedTask(task=find_task("narrativeqa"), config=config, samples=samples, examples=None)
    system = _system(window=150)
    plan = make_plan([system], [task], protocol, arc_names=(), seed=0, max_batch_rows=500)
    planned = [each for batch in plan.batches for each in batch.prompts]
    kept = [part.text for each in planned for part in each.prompt.parts if isinstance(part, Document)]
    assert (
        all(each.rows <= 150 and each.rows == system.num_rows(each.prompt) + 5 for each in planned)
        and len(planned) == 8
    )
    assert {each.num_cut for each in planned} == {len(texts[0]) - len(text) for text in kept}
    is_reference = protocol is REFERENCE
    assert len(set(kept)) == (8 if is_reference else 2)
    assert all(bool(each.prompt.shared) != is_reference for each in planned)

"""An evaluation with a system that needs no model: the kind "echo", a file of questions, and a config."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from arc_ds.config.ranges import NonNegativeFloat, Positive
from arc_ds.evaluation.sample import Document, EvalPrompt
from arc_ds.evaluation.systems import KINDS
from arc_ds.evaluation.systems.kind import SystemKind, SystemSettings
from arc_ds.evaluation.systems.system import Answer, AnswerNll


@dataclass(frozen=True, kw_only=True)
class EchoSection:
    """Keys of the kind "echo"."""

    window: Positive | None = None
    """Longest prompt plus answer, in words."""
    closed: bool = False
    """Read no documents."""
    batch_s: NonNegativeFloat = 0.0
    """Time for a batch."""


class Echo:
    """Answers with the last word of the sample's document. `raw` shows which samples made its batch."""

    def __init__(self, section: EchoSection, settings: SystemSettings) -> None:
        self.section, self.settings = section, settings
        self.name, self.uses_documents, self.max_rows = settings.name, not section.closed, section.window
        self.num_answered = 0

    def num_rows(self, prompt: EvalPrompt) -> int:
        return sum(len(_text(part).split()) for part in prompt.parts)

    def answer(self, prompts: Sequence[EvalPrompt]) -> list[Answer]:
        time.sleep(self.section.batch_s)
        self.num_answered += len(prompts)
        batch = ",".join(prompt.sample.id for prompt in prompts)
        return [Answer(text=_last_word(prompt), raw=f"{batch}|{prompt.sample.id}", stop="string") for prompt in prompts]

    def answer_nll(self, prompts: Sequence[EvalPrompt], answers: Sequence[str]) -> list[AnswerNll]:
        return [AnswerNll(self.num_rows(p) / 7, len(a.split())) for p, a in zip(prompts, answers, strict=True)]

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "echo", "decoder": "none", "device": str(self.settings.device)}


def _last_word(prompt: EvalPrompt) -> str:
    documents = [part.text for part in prompt.parts if isinstance(part, Document)]
    return documents[-1].split()[-1] if documents else "unknown"


def _text(part: str | Document) -> str:
    return part.text if isinstance(part, Document) else part


KINDS["echo"] = SystemKind(section=EchoSection, build=Echo)


def write_questions(path: Path, count: int, *, first: int = 0) -> Path:
    """A file of task "qa": question i has a passage of 3 + i % 11 words, whose last word is the answer."""
    rows = [
        {
            "id": f"q{idx}",
            "question": f"Which word ends passage {idx}?",
            "answer": f"end{idx}",
            "passages": [" ".join([f"w{idx}"] * (2 + idx % 11)) + f" end{idx}"],
        }
        for idx in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_config(folder: Path, **changes: Any) -> Path:
    """A config over 40 questions and two systems, with 2 in-context examples of a file of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    task = {
        "name": "qa",
        "path": str(write_questions(folder / "questions.jsonl", 40)),
        "examples": str(write_questions(folder / "examples.jsonl", 5, first=100)),
        "num_examples": 2,
        "max_new_tokens": 4,
    }
    config = {
        "output": str(folder / "out"),
        "tasks": [task],
        "systems": [{"kind": "echo", "name": "open"}, {"kind": "echo", "name": "closed", "closed": True}],
        "max_batch_rows": 220,
        "device": "cpu",
        "wait_s": 20,
        **changes,
    }
    path = folder / "eval.yaml"
    path.write_text(yaml.safe_dump(config))
    return path

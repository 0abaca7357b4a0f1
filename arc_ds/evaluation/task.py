"""The description of an evaluated task. Each module of `datasets/` has some, and registers them in `TASKS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from arc_ds.evaluation.protocol import Protocol
from arc_ds.evaluation.sample import EvalSample

Metric = Literal["em", "f1", "substring", "approx_em", "rouge_l", "bleu", "bleu_other_case", "chrf", "nll"]


@dataclass(frozen=True, kw_only=True)
class EvalTask:
    """A task: how its files are read, and how its prompts look. `metrics.METRICS_OF` has its metrics.

    name: name in configs, results and tables.
    read: reads the samples of one file or folder in the file's order. Raises DataError that names the fields found and
        the fields wanted if the file has another layout.
    layout: "blocks": Document, Question and Answer lines with in-context examples (paper, appendix C). "long": a label,
        one long document, an instruction and an answer label, without examples.
    labels: "long" only: label of the document, of the question ("" if there is none) and of the answer.
    instruction: "long" only: instruction after the document.
    num_passages: passages of a document: the first ones of the sample, joined by a newline. None: all.
    num_examples: default number of in-context examples. "long" has none.
    max_new_tokens: default limit of an answer.
    stop: texts that end an answer.
    """

    name: str
    read: Callable[[Path, Protocol], Sequence[EvalSample]]
    layout: Literal["blocks", "long"] = "blocks"
    labels: tuple[str, str, str] = ("Document", "Question", "Answer")
    instruction: str = ""
    num_passages: int | None = 1
    num_examples: int = 5
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ("\n\n",)

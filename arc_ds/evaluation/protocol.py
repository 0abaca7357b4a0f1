"""How prompts are made and answers are scored: the choices in which the reference differs from a clean evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Every field is written into each result. The defaults are the clean protocol; `REFERENCE` is the other preset.

    examples: choice of the in-context examples. "split": drawn by (seed, task) from the task's split for examples, or
        from the tested file if it has none; the same for all samples. "per_sample": drawn anew for each sample.
        "reference": the first ones of the tested file after the reference's constant permutation. Examples are never
        tested.
    references: "all" accepted answers, or only the "first" one of NQ and SQuAD, and TriviaQA's aliases alone.
    closed_book_seam: text between the last in-context example and a closed-book question: "\\n\\n" as between blocks.
        The reference has one newline more, also before a question without examples.
    bleu_lowercase: lowercase BLEU (the reference), or with case. Both are always computed; this one is the headline.
    stop_at_blank_line: end an answer at its first blank line. The reference continues: it cuts the text of short tasks
        afterwards, which gives the same answers, and does not cut that of long tasks.
    qasper_by_question: in tasks with a long document, take the maximum over all references of a question; otherwise
        each row of the file is a sample with its own references.
    truncation: part of a long document that is kept if it exceeds the decoder's window, for every system.
        "reference": the head for ARC, the tail for the others.
    sample_govreport: sample GovReport's summaries with temperature 0.7 and top-p 0.8; otherwise all is greedy.
    ratio: "decoder": the decoder's tokens of all documents over their rows; "encoder": the encoder's tokens of the last
        document over its vectors without the marker.
    """

    name: str = "clean"
    examples: Literal["split", "per_sample", "reference"] = "split"
    references: Literal["all", "first"] = "all"
    closed_book_seam: str = "\n\n"
    bleu_lowercase: bool = False
    stop_at_blank_line: bool = True
    qasper_by_question: bool = True
    truncation: Literal["head", "tail", "middle", "reference"] = "tail"
    sample_govreport: bool = False
    ratio: Literal["decoder", "encoder"] = "decoder"


CLEAN = Protocol()
REFERENCE = Protocol(
    name="reference",
    examples="reference",
    references="first",
    closed_book_seam="\n\n\n",
    bleu_lowercase=True,
    stop_at_blank_line=False,
    qasper_by_question=False,
    truncation="reference",
    sample_govreport=True,
    ratio="encoder",
)

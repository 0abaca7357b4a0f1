"""Questions on documents as scripts, plain or in a chat (paper, appendices C and D)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from arc_ds.data.tasks.asked import Asked
from arc_ds.data.tasks.chat import Layout, Turn
from arc_ds.data.tasks.example import Example, ExampleSpec, TaskCounts, script_example
from arc_ds.data.tasks.script import Document, Part, Special, Words

_BLANK_LINE = "\n\n"


@dataclass(frozen=True, slots=True)
class Block:
    """Documents with a question and its answer.

    documents: the chunks of one text, or a single document.
    asked: question and answer.
    """

    documents: tuple[Document, ...]
    asked: Asked


def question_example(blocks: Sequence[Block], passages: tuple[str, ...], spec: ExampleSpec, **cuts: int) -> Example:
    """The example of some blocks. It counts the cuts of the last question and answer.

    blocks: at least one. The last one is the question; the others are in-context examples.
    passages: all of the sample's own record.
    spec: tokenizers, sizes and layout.
    cuts: the other fields of `TaskCounts`.
    """
    asked = blocks[-1].asked
    counts = TaskCounts(cut_questions=int(asked.question_is_cut), cut_answers=int(asked.answer_is_cut), **cuts)
    return script_example(_write(blocks, spec), passages, spec, counts)


def _write(blocks: Sequence[Block], spec: ExampleSpec) -> tuple[Part, ...]:
    """Write the blocks as a script. The target is the last answer and its end.

    An answer that was cut has no end, so nothing after it is a target.
    """
    layout = spec.layout
    is_whole = not blocks[-1].asked.answer_is_cut
    turns = [_turn(block, layout, is_last=place == len(blocks) - 1) for place, block in enumerate(blocks)]
    if layout.is_chat:
        return layout.chat(turns, is_whole=is_whole)
    parts: list[Part] = [Special(spec.bos_ids)] if spec.bos_ids else []
    for turn in turns[:-1]:
        parts += [*turn.user, *turn.assistant, Words(_BLANK_LINE)]
    # The blank line before a next block ends an answer, and generation stops there. The in-context examples show this
    # pattern to the decoder; an end-of-text would be new to it.
    end = (Words(_BLANK_LINE, in_loss=True),) if is_whole else ()
    return (*parts, *turns[-1].user, *turns[-1].assistant, *end)


def _turn(block: Block, layout: Layout, *, is_last: bool) -> Turn:
    asked = block.asked
    answer = Words(asked.answer, in_loss=is_last)
    if layout.is_chat and asked.prompt is not None:
        prefix, suffix = asked.prompt.prefix, asked.prompt.suffix
        space = " " if suffix and not suffix[-1].isspace() else ""
        before = Words(prefix, with_context=True)
        return Turn((before, *block.documents, Words(asked.question or "")), (Words(suffix + space), answer))
    before = Words("Document: ", with_context=True)
    question = "" if asked.question is None else f"Question: {asked.question}"
    line_end = Words("\n", with_context=True)
    if layout.is_chat:
        behind = (line_end, Words(question)) if question else ()
        return Turn((before, *block.documents, *behind), (Words("Answer: "), answer))
    line = Words(f"{question}\n" if question else "")
    return Turn((before, *block.documents, line_end, line), (Words("Answer: "), answer))

r"""Reconstruction and continuation as scripts (paper, appendix D).

In a chat:  Text:\n\n⟨context⟩\nReplicate the input text.          Replicated text:\nthe same text
            Text:\n\nprefix⟨context⟩\nContinue the previous text.  Text continuation:\n...continuation
"""

from __future__ import annotations

from collections.abc import Sequence

from arc_ds.data.tasks.chat import Layout, Turn
from arc_ds.data.tasks.example import ExampleSpec
from arc_ds.data.tasks.script import Document, Part, Special, Words

_TEXT = "Text:\n\n"


def write_reconstruction(document: Document, layout: Layout) -> tuple[Part, ...]:
    """A chat that asks for a repetition of the document. The end of the turn is a target, because the text ends."""
    user = (
        Words(_TEXT, with_context=True),
        document,
        Words("\n", with_context=True),
        Words("Replicate the input text."),
    )
    assistant = (Words("Replicated text:\n"), Words(document.text, in_loss=True))
    return layout.chat([Turn(user, assistant)], is_whole=True)


def write_continuation(prefix: str, documents: Sequence[Document], target: str, spec: ExampleSpec) -> tuple[Part, ...]:
    """A text of prefix, documents and target. The text continues after its target, so a chat's end is no target.

    prefix: plain text before the documents; may be empty.
    documents: the contexts.
    target: the text after them.
    spec: tokenizers and layout.
    """
    continuation = Words(target, in_loss=True)
    if not spec.layout.is_chat:
        begin = (Special(spec.bos_ids),) if spec.bos_ids else ()
        return (*begin, Words(prefix), *documents, continuation)
    before, line_end = Words(_TEXT + prefix, with_context=not prefix), Words("\n", with_context=not prefix)
    user: tuple[Part, ...] = (before, *documents, line_end, Words("Continue the previous text."))
    return spec.layout.chat([Turn(user, (Words("Text continuation:\n..."), continuation))], is_whole=False)

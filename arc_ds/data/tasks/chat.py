"""The layout of a decoder's text: one running text, or the turns of a chat (paper, appendix D).

A layout holds the text and special tokens that a chat template writes around the turns. It is found once, by rendering
the template around placeholders. Texts never pass through a template, so nothing in them can become a special token,
and no template can trim them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from arc_ds.data.tasks.chat_template import ANSWERS, QUESTIONS, render_template
from arc_ds.data.tasks.script import Part, Special, Words
from arc_ds.errors import TokenizerError
from arc_ds.tokenizers import Tokenizer

LayoutName = Literal["none", "llama2", "chatml", "tokenizer"]
Fixed = tuple[Words | Special, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """The user's part of a turn, including documents, and the assistant's answer."""

    user: tuple[Part, ...]
    assistant: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The template's text around the turns of a chat. The plain layout has none: a sequence is one running text.

    name: of the layout.
    head: before the first turn.
    middle: between the user's words and the answer.
    between: between an answer and the next turn.
    last_middle: `middle` of the last turn.
    end: after the last answer, up to the token that ends the turn.
    """

    name: LayoutName = "none"
    head: Fixed = ()
    middle: Fixed = ()
    between: Fixed = ()
    last_middle: Fixed = ()
    end: Fixed = ()

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The special tokens of all parts."""
        parts = (*self.head, *self.middle, *self.between, *self.last_middle, *self.end)
        return tuple(idx for part in parts if isinstance(part, Special) for idx in part.ids)

    @property
    def is_chat(self) -> bool:
        return self.name != "none"

    def chat(self, turns: Sequence[Turn], *, is_whole: bool) -> tuple[Part, ...]:
        """The turns, at least one, as a script. If the last answer `is_whole`, its end is a target too."""
        parts: list[Part] = [*self.head]
        for turn in turns[:-1]:
            parts += [*turn.user, *self.middle, *turn.assistant, *self.between]
        end = [replace(part, in_loss=True) for part in self.end] if is_whole else self.end
        return (*parts, *turns[-1].user, *self.last_middle, *turns[-1].assistant, *end)


PLAIN = Layout()


def read_layout(name: LayoutName, tokenizer: Tokenizer, path: str | Path) -> Layout:
    """The layout of a decoder.

    name: "none"; "llama2": `<s>[INST] user [/INST] assistant </s>`; "chatml": `<|im_start|>user\\n…<|im_end|>`;
        "tokenizer": the template in the tokenizer's files (see `chat_template`).
    tokenizer: the decoder's.
    path: its file or folder.

    Raises TokenizerError if there is no template, the tokenizer lacks the template's special tokens, or the template
    cannot be rendered.
    """
    if name == "none":
        return PLAIN
    if name == "llama2":
        return _llama2(tokenizer)
    if name == "chatml":
        return _chatml(tokenizer)
    written = render_template(tokenizer, Path(path))
    head, middle, between, last_middle, end = re.split("|".join((*QUESTIONS, *ANSWERS)), written)
    return _layout("tokenizer", tokenizer.special_ids, (head, middle, between, last_middle, end), tokenizer.eos_id)


def _llama2(tokenizer: Tokenizer) -> Layout:
    if tokenizer.bos_id is None or tokenizer.eos_id is None:
        raise TokenizerError(
            "chat_template llama2 begins and ends its turns with the tokenizer's begin- and end-of-text, and this "
            "tokenizer lacks one of them. Set chat_template to tokenizer or chatml, or use the tokenizer of Llama 2."
        )
    marks = {"<s>": tokenizer.bos_id, "</s>": tokenizer.eos_id}
    pieces = ("<s>[INST] ", " [/INST] ", " </s><s>[INST] ", " [/INST] ", " </s>")
    return _layout("llama2", marks, pieces, tokenizer.eos_id)


def _chatml(tokenizer: Tokenizer) -> Layout:
    begin, end = "<|im_start|>", "<|im_end|>"
    missing = [mark for mark in (begin, end) if mark not in tokenizer.special_ids]
    if missing:
        raise TokenizerError(
            f"chat_template chatml needs the special tokens {begin} and {end}; this tokenizer lacks "
            f"{' and '.join(missing)}. Set chat_template to tokenizer, llama2 or none."
        )
    middle = f"{end}\n{begin}assistant\n"
    pieces = (f"{begin}user\n", middle, f"{end}\n{begin}user\n", middle, end)
    return _layout("chatml", tokenizer.special_ids, pieces, tokenizer.eos_id)


def _layout(
    name: LayoutName, marks: Mapping[str, int], pieces: tuple[str, str, str, str, str], eos_id: int | None
) -> Layout:
    """The layout from a template's five pieces of text around two turns. `marks`: the special tokens in them."""
    head, middle, between, last_middle, end = (_fixed(piece, marks) for piece in pieces)
    first_mark = next((place for place, part in enumerate(end) if isinstance(part, Special)), None)
    if first_mark is not None:
        end = end[: first_mark + 1]
    elif eos_id is not None:  # a template may leave the end of the last turn to generation
        end = (*end, Special((eos_id,)))
    return Layout(name=name, head=head, middle=middle, between=between, last_middle=last_middle, end=end)


def _fixed(text: str, marks: Mapping[str, int]) -> Fixed:
    """A template's text, split at its special tokens."""
    names = sorted(marks, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    return tuple(Special((marks[piece],)) if piece in marks else Words(piece) for piece in pieces if piece)

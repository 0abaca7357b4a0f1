"""A decoder's tokenizer, and the chat layout around its turns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from arc_ds.data.tasks.chat import PLAIN, Layout, LayoutName, read_layout
from arc_ds.tokenizers import Tokenizer, load_tokenizer


class Reader(NamedTuple):
    """One decoder's tokenizer and layout, loaded."""

    tokenizer: Tokenizer
    layout: Layout = PLAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderFiles:
    """A decoder's files, before they are loaded.

    tokenizer: file or folder of the tokenizer.
    chat_template: name of the layout.
    """

    tokenizer: str | Path
    chat_template: LayoutName = "none"

    def load(self) -> Reader:
        """Read the files. Raises TokenizerError if the tokenizer or the template cannot be used."""
        tokenizer = load_tokenizer(self.tokenizer)
        return Reader(tokenizer=tokenizer, layout=read_layout(self.chat_template, tokenizer, self.tokenizer))

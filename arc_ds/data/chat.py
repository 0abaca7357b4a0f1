"""How a decoder is spoken to: plain text, or the turns of a chat (design 7; paper, appendix D)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What stands around the turns of a sequence. The plain layout has none: the sequence is one running text."""

    is_chat: bool = False


PLAIN = Layout()

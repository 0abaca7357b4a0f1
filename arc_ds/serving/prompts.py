"""Prompts: the messages and documents of a request, written as in training.

A base decoder reads `Document: ⟨contexts⟩\\nQuestion: …\\nAnswer:`, a chat decoder the same in the turns of its
template (`arc_ds.data.tasks.questions`). A turn without documents is a chat decoder's own turn, without these words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from arc_ds.batch.segments import Marker, Segment, TokenIds
from arc_ds.data.tasks.chat import Layout, Turn
from arc_ds.data.tasks.script import Document, Part, Words, render
from arc_ds.inference.arc import Context
from arc_ds.inference.tags import parse_prompt
from arc_ds.serving.protocol import ChatBody, CompletionBody, MessageBody, RequestError
from arc_ds.system.user_files import check_encodable
from arc_ds.tokenizers import Tokenizer

PromptParts = tuple[str | Context, ...]
_INSTRUCTIONS = ("system", "developer")
BLANK_LINE = "\n\n"  # ends an answer of a base decoder, as in training


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """A user's words with their documents, and the answer; None for the last turn, which is to be answered."""

    documents: tuple[Context, ...]
    words: str
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation. `system` is empty if there are no instructions."""

    system: str
    turns: tuple[ChatTurn, ...]


def read_chat(body: ChatBody, marker: Marker | None) -> Chat:
    """The conversation of a body. Its `documents` belong to the last turn.

    Adjacent messages of one role count as one. Raises RequestError unless users and assistants alternate, from a user
    to a user.
    """
    systems = [message for message in body.messages if message.role in _INSTRUCTIONS]
    others = [message for message in body.messages if message.role not in _INSTRUCTIONS]
    groups = [(role, list(members)) for role, members in groupby(others, key=lambda message: message.role)]
    if not groups or groups[0][0] != "user" or groups[-1][0] != "user":
        raise RequestError(400, "`messages` must begin and end with a message of the user", param="messages")
    turns = []
    for place, (role, members) in enumerate(groups):
        if role == "user":
            answers = groups[place + 1][1] if place + 1 < len(groups) else []
            turns.append(ChatTurn(_documents(members, marker), _words(members), _words(answers) if answers else None))
    if any(
        part.type == "document" for message in body.messages if message.role != "user" for part in message.content or ()
    ):
        raise RequestError(400, "a part of type `document` must be in a message of the user", param="messages")
    more = tuple(Context(document.text, marker) for document in body.documents or ())
    last = turns[-1]
    turns[-1] = ChatTurn((*more, *last.documents), last.words)
    if not turns[-1].documents and not last.words:
        raise RequestError(400, "the last message is empty, and there are no documents", param="messages")
    return Chat(_words(systems), tuple(turns))


def read_completion(body: CompletionBody, marker: Marker | None) -> PromptParts:
    """The prompt of a body. `<context>…</context>` in it is a context; `documents` come before it."""
    documents = tuple(Context(document.text, marker) for document in body.documents or ())
    return (*_before(documents), *(("\n",) if documents else ()), *parse_prompt(body.prompt, marker))


def write_plain(chat: Chat) -> PromptParts:
    """The running text of a base decoder, up to the answer."""
    parts: list[str | Context] = [chat.system + BLANK_LINE] if chat.system else []
    for turn in chat.turns:
        question = f"Question: {turn.words}\n" if turn.words else ""
        line_end = "\n" if turn.documents else ""
        answer = "" if turn.answer is None else f" {turn.answer}{BLANK_LINE}"
        parts += [*_before(turn.documents), f"{line_end}{question}Answer:{answer}"]
    return tuple(parts)


def write_user(turn: ChatTurn) -> PromptParts:
    """The user's part of a chat decoder's turn."""
    if not turn.documents:
        return (turn.words,)
    return (*_before(turn.documents), *((f"\nQuestion: {turn.words}",) if turn.words else ()))


def chat_segments(chat: Chat, layout: Layout, encoder: Tokenizer, decoder: Tokenizer) -> list[Segment]:
    """The tokens of the turns of a chat decoder's template, up to the answer.

    Instructions stand before the user's first words: templates differ in whether they know a system's turn.
    """
    turns = []
    for place, turn in enumerate(chat.turns):
        system = (chat.system + BLANK_LINE,) if chat.system and place == 0 else ()
        user = [_script(part, encoder) for part in (*system, *write_user(turn))]
        lead = "Answer:" if turn.documents else ""
        space = " " if lead and turn.answer else ""
        turns.append(Turn(tuple(user), (Words(f"{lead}{space}{turn.answer or ''}"),)))
    parts = layout.chat(turns, is_whole=False)
    return list(render(parts[: len(parts) - len(layout.end)], decoder).prompt)


def chat_messages(chat: Chat) -> list[dict[str, Any]]:
    """The conversation as messages whose contents are lists of texts and contexts, for another server's template."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": [chat.system]}] if chat.system else []
    for turn in chat.turns:
        messages.append({"role": "user", "content": list(write_user(turn))})
        if turn.answer is not None:
            messages.append({"role": "assistant", "content": [turn.answer]})
    return messages


def as_text(parts: Sequence[str | Context]) -> str:
    """The prompt with the text of each context in its place."""
    return "".join(part.text if isinstance(part, Context) else part for part in parts)


def _before(documents: Sequence[Context]) -> PromptParts:
    return ("Document: ", *documents) if documents else ()


def _script(part: str | Context, encoder: Tokenizer) -> Part:
    if isinstance(part, str):
        return Words(check_encodable(part, "a message"))
    ids = encoder.encode(check_encodable(part.text, "a document"))
    if not ids:
        raise RequestError(400, "a document gives no token: leave it out or give it text", param="documents")
    return Document(TokenIds(ids), part.text, part.marker)


def _words(messages: Sequence[MessageBody]) -> str:
    said = ("".join(part.text for part in m.content or () if part.type == "text").strip() for m in messages)
    return BLANK_LINE.join(words for words in said if words)


def _documents(messages: Sequence[MessageBody], marker: Marker | None) -> tuple[Context, ...]:
    parts = (part for message in messages for part in message.content or ())
    return tuple(Context(part.text, marker) for part in parts if part.type == "document")

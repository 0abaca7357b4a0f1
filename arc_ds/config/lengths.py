"""The longest sequences that a run's encoder and decoders can meet, from its config."""

from __future__ import annotations

import math
from typing import NamedTuple

from arc_ds.config.schema import RunConfig, SourceConfig

# Bytes, of which none has two tokens, of the words that tasks write: around a question, and around a text in a chat.
_ASKED_WORDS = 32
_TEXT_WORDS = 57


class ChatRows(NamedTuple):
    """Decoder rows of what a chat template writes itself: around the first turn, and around each further one."""

    first: int
    further: int


NO_CHAT = ChatRows(0, 0)
# Where the tokenizer is not read: the bytes of the two known templates, and of others what a system prompt takes.
_UNREAD = {
    "none": NO_CHAT,
    "llama2": ChatRows(24, 24),
    "chatml": ChatRows(24, 24),
    "tokenizer": ChatRows(256, 64),
}


def longest_context(config: RunConfig) -> int:
    """Most encoder tokens of one context."""
    data = config.data
    return max(
        {
            "pretraining": data.max_context_tokens,
            "few_shot": data.max_documents_tokens,
            "long_context": source.chunk_tokens,
        }[source.task]
        for source in (*data.sources, *data.held_out)
    )


def largest_sample(config: RunConfig, source: SourceConfig) -> tuple[int, int]:
    """Most encoder tokens (memory tokens included) and most decoder rows of one training sample of a source; a token of
    the encoder's taken for one of the decoder's, as in `longest_sequence`. No file is read: a chat template of a
    tokenizer's own is taken to write at most 256 tokens around a first turn, and 64 around another."""
    contexts, context_tokens = _contexts(config, source)
    rows = (_rows(config, source, _UNREAD[decoder.chat_template], is_open=False) for decoder in config.decoders)
    return context_tokens + contexts * config.pooling.memory_tokens, max(rows)


def longest_sequence(config: RunConfig, chat: ChatRows) -> int:
    """Most decoder rows of one sequence, a token of the encoder's taken for one of the decoder's.

    chat: of the decoder's template. In validation the text of the contexts stands in their place too.
    """
    trained = (_rows(config, source, chat, is_open=False) for source in config.data.sources)
    held_out = (_rows(config, source, chat, is_open=True) for source in config.data.held_out)
    return max((*trained, *held_out))


def _rows(config: RunConfig, source: SourceConfig, chat: ChatRows, *, is_open: bool) -> int:
    data = config.data
    text_words = 0 if chat == NO_CHAT else _TEXT_WORDS
    asked = data.max_question_tokens + data.max_answer_tokens + _ASKED_WORDS
    if source.task == "pretraining":
        # Reconstruction repeats the context, which can be longer than a prefix and a continuation.
        said = max(data.max_prefix_tokens + data.max_continuation_tokens, data.max_context_tokens) + text_words
    elif source.task == "few_shot":
        said = asked * (source.in_context_examples + 1) + chat.further * source.in_context_examples
    else:
        said = max(data.max_continuation_tokens + text_words, asked)
    contexts, context_tokens = _contexts(config, source)
    compressed = context_tokens if is_open else _compressed(config, contexts, context_tokens)
    return 1 + chat.first + said + compressed


def _contexts(config: RunConfig, source: SourceConfig) -> tuple[int, int]:
    """Most contexts of one sample of a source, and most encoder tokens of them together."""
    data = config.data
    if source.task == "pretraining":
        return 1, data.max_context_tokens
    if source.task == "few_shot":
        return source.in_context_examples + 1, data.max_documents_tokens
    return data.max_chunks, data.max_chunks * source.chunk_tokens


def _compressed(config: RunConfig, contexts: int, context_tokens: int) -> int:
    """Most compressed rows of some contexts, their markers included."""
    pooling = config.pooling
    if pooling.memory_tokens or pooling.num_groups:
        return contexts * (max(pooling.memory_tokens, pooling.num_groups or 0) + 1)
    return math.ceil(context_tokens / math.prod(pooling.factors)) + 2 * contexts

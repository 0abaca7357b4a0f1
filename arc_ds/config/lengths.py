"""The longest sequences that a run's encoder and decoders can meet, from its config."""

from __future__ import annotations

import math

from arc_ds.config.schema import RunConfig, SourceConfig

_TEMPLATE = 32  # rows of the words around a question and its answer, more than any template has


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
    the encoder's taken for one of the decoder's, as in `longest_sequence`."""
    contexts, context_tokens = _contexts(config, source)
    return context_tokens + contexts * config.pooling.memory_tokens, _rows(config, source, is_open=False)


def longest_sequence(config: RunConfig) -> int:
    """Most decoder rows of one sequence, a token of the encoder's taken for one of the decoder's.

    In validation the text of the contexts stands in their place too.
    """
    trained = (_rows(config, source, is_open=False) for source in config.data.sources)
    held_out = (_rows(config, source, is_open=True) for source in config.data.held_out)
    return max((*trained, *held_out))


def _rows(config: RunConfig, source: SourceConfig, *, is_open: bool) -> int:
    data = config.data
    asked = data.max_question_tokens + data.max_answer_tokens + _TEMPLATE
    if source.task == "pretraining":
        # Reconstruction repeats the context, which can be longer than a prefix and a continuation.
        plain = max(data.max_prefix_tokens + data.max_continuation_tokens, data.max_context_tokens)
    elif source.task == "few_shot":
        plain = asked * (source.in_context_examples + 1)
    else:
        plain = max(data.max_continuation_tokens, asked)
    contexts, context_tokens = _contexts(config, source)
    return 1 + plain + (context_tokens if is_open else _compressed(config, contexts, context_tokens))


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

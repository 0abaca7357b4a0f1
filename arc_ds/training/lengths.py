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
        contexts, context_tokens = 1, data.max_context_tokens
    elif source.task == "few_shot":
        plain = asked * (source.in_context_examples + 1)
        contexts, context_tokens = source.in_context_examples + 1, data.max_documents_tokens
    else:
        plain = max(data.max_continuation_tokens, asked)
        contexts, context_tokens = data.max_chunks, data.max_chunks * source.chunk_tokens
    return 1 + plain + (context_tokens if is_open else _compressed(config, contexts, context_tokens))


def _compressed(config: RunConfig, contexts: int, context_tokens: int) -> int:
    """Most compressed rows of some contexts, their markers included."""
    pooling = config.pooling
    if pooling.memory_tokens or pooling.num_groups:
        return contexts * (max(pooling.memory_tokens, pooling.num_groups or 0) + 1)
    return math.ceil(context_tokens / math.prod(pooling.factors)) + 2 * contexts

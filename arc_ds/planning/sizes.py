"""Sizes of the largest samples of a run, computed from its config.

Memory, attention windows and micro-batch limits must fit these samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from arc_ds.config.schema import RunConfig, SourceConfig
from arc_ds.data.tasks import TaskLimits
from arc_ds.data.tasks.registry import all_tasks, find_task
from arc_ds.data.tasks.task import NO_CHAT, ChatRows, Largest
from arc_ds.errors import ConfigError

# Bytes of the words that tasks write around a text in a chat. A byte is at most one token, so this bounds their tokens.
TEXT_WORDS = 57
# Bounds without reading the tokenizer: bytes of the two known templates; for other templates, rows of a system prompt.
_UNREAD = {
    "none": NO_CHAT,
    "llama2": ChatRows(24, 24, TEXT_WORDS),
    "chatml": ChatRows(24, 24, TEXT_WORDS),
    "tokenizer": ChatRows(256, 64, TEXT_WORDS),
}


def check_tasks(config: RunConfig) -> None:
    """Raise a ConfigError that lists all problems with the tasks of sources.

    Problems are unknown tasks, keys that the source's task does not use, and micro-batch limits that are smaller than
    the largest sample.
    """
    named = [(f"data.sources.{idx}", source) for idx, source in enumerate(config.data.sources)]
    named += [(f"data.validation.{idx}", source) for idx, source in enumerate(config.data.held_out)]
    problems = [problem for key, source in named for problem in _source_problems(key, source)]
    problems = problems or [*_limit_problems(config)]  # an unknown task has no largest sample
    if problems:
        raise ConfigError("\n".join(problems))


def task_limits(config: RunConfig, source: SourceConfig) -> TaskLimits:
    """Sizes and layout of the samples of a source."""
    markers = {"cont": config.markers.cont, "rec": config.markers.rec}
    return TaskLimits(
        max_context=config.data.max_context_tokens,
        max_prefix=config.data.max_prefix_tokens,
        max_continuation=config.data.max_continuation_tokens,
        max_documents=config.data.max_documents_tokens,
        max_passages=source.max_passages,
        max_question=config.data.max_question_tokens,
        max_answer=config.data.max_answer_tokens,
        chunk_tokens=source.chunk_tokens,
        max_chunks=config.data.max_chunks,
        bos=config.data.decoder_bos,
        markers=frozenset(marker for marker, is_kept in markers.items() if is_kept),  # type: ignore[misc]
    )


def longest_context(config: RunConfig) -> int:
    """Maximum number of encoder tokens of one context."""
    sources = (*config.data.sources, *config.data.held_out)
    return max(_largest(config, source, NO_CHAT).longest_context for source in sources)


def largest_sample(config: RunConfig, source: SourceConfig) -> tuple[int, int]:
    """Maximum number of encoder tokens (including memory tokens) and of decoder rows of a source's training samples.

    As in `longest_sequence`, one encoder token counts as one decoder token. No file is read: a chat template from a
    tokenizer is assumed to add at most 256 tokens around the first turn and 64 around each other turn.
    """
    largest = _largest(config, source, NO_CHAT)
    templates = {decoder.chat_template for decoder in config.trained_decoders.values()}
    rows = (_rows(config, source, _UNREAD[template], is_open=False) for template in templates)
    return largest.context_tokens + largest.contexts * config.pooling.memory_tokens, max(rows)


def longest_sequence(config: RunConfig, chat: ChatRows) -> int:
    """Maximum number of decoder rows of one sequence. One encoder token counts as one decoder token.

    Validation also scores sequences that contain the text of the contexts instead of their vectors.

    chat: rows that the decoder's chat template adds.
    """
    trained = (_rows(config, source, chat, is_open=False) for source in config.data.sources)
    held_out = (_rows(config, source, chat, is_open=True) for source in config.data.held_out)
    return max((*trained, *held_out))


def _largest(config: RunConfig, source: SourceConfig, chat: ChatRows) -> Largest:
    return find_task(source.task).largest(task_limits(config, source), source.in_context_examples, chat)


def _rows(config: RunConfig, source: SourceConfig, chat: ChatRows, *, is_open: bool) -> int:
    largest = _largest(config, source, chat)
    compressed = largest.context_tokens if is_open else _compressed(config, largest)
    return 1 + chat.first + largest.text_rows + compressed


def _compressed(config: RunConfig, largest: Largest) -> int:
    """Maximum number of compressed rows of a sample's contexts, including markers."""
    pooling, contexts = config.pooling, largest.contexts
    if pooling.memory_tokens or pooling.num_groups:
        return contexts * (max(pooling.memory_tokens, pooling.num_groups or 0) + 1)
    return math.ceil(largest.context_tokens / math.prod(pooling.factors)) + 2 * contexts


def _source_problems(key: str, source: SourceConfig) -> Iterator[str]:
    try:
        find_task(source.task)
    except ConfigError as error:
        yield f"{key}.task: {error}"
        return
    defaults = SourceConfig(path=source.path)
    owners = {name: task.name for task in all_tasks().values() for name in task.own_keys}
    for name, owner in owners.items():
        value = getattr(source, name)
        if source.task != owner and value != getattr(defaults, name):
            yield (
                f"{key}.{name} is {value}, but only the task {owner} uses this key, and the task of this source is "
                f"{source.task}. Set task: {owner}, or remove the key."
            )


def _limit_problems(config: RunConfig) -> Iterator[str]:
    """Problems with micro-batch limits: a micro-batch must fit the largest sample of every source."""
    data = config.data
    sizes = [largest_sample(config, source) for source in data.sources]
    limits = {"data.max_encoder_tokens": data.max_encoder_tokens, "data.max_decoder_rows": data.max_decoder_rows}
    for which, (key, limit) in enumerate(limits.items()):
        idx = max(range(len(sizes)), key=lambda idx: sizes[idx][which])
        task = find_task(data.sources[idx].task)
        if limit is not None and limit < sizes[idx][which]:
            yield (
                f"{key} is {limit}; expected {sizes[idx][which]} or more, the size of the largest sample of "
                f"data.sources.{idx} ({task.name}). Raise {key} (null: no limit) or lower {task.size_keys}."
            )

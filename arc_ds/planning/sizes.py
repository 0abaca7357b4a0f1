"""The largest samples of a run, from its config: what memory, attention windows and limits have to hold."""

from __future__ import annotations

import math
from collections.abc import Iterator

from arc_ds.config.schema import RunConfig, SourceConfig
from arc_ds.data.tasks import TaskLimits
from arc_ds.data.tasks.registry import all_tasks, find_task
from arc_ds.data.tasks.task import NO_CHAT, ChatRows, Largest
from arc_ds.errors import ConfigError

# Bytes, of which none has two tokens, of the words that tasks write around a text in a chat.
TEXT_WORDS = 57
# If the tokenizer is not read: the bytes of the two known templates, and of others the rows of a system prompt.
_UNREAD = {
    "none": NO_CHAT,
    "llama2": ChatRows(24, 24, TEXT_WORDS),
    "chatml": ChatRows(24, 24, TEXT_WORDS),
    "tokenizer": ChatRows(256, 64, TEXT_WORDS),
}


def check_tasks(config: RunConfig) -> None:
    """ConfigError that lists every source whose task is unknown, every key that its task does not use, and every limit
    of a micro-batch that its largest sample exceeds."""
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
    """Most encoder tokens of one context."""
    sources = (*config.data.sources, *config.data.held_out)
    return max(_largest(config, source, NO_CHAT).longest_context for source in sources)


def largest_sample(config: RunConfig, source: SourceConfig) -> tuple[int, int]:
    """Most encoder tokens (memory tokens included) and most decoder rows of one training sample of a source.

    A token of the encoder's is taken for one of the decoder's, as in `longest_sequence`. No file is read: a chat
    template of a tokenizer's own is taken to write at most 256 tokens around a first turn, and 64 around another.
    """
    largest = _largest(config, source, NO_CHAT)
    rows = (_rows(config, source, _UNREAD[decoder.chat_template], is_open=False) for decoder in config.decoders)
    return largest.context_tokens + largest.contexts * config.pooling.memory_tokens, max(rows)


def longest_sequence(config: RunConfig, chat: ChatRows) -> int:
    """Most decoder rows of one sequence, a token of the encoder's taken for one of the decoder's.

    chat: of the decoder's template. In validation the text of the contexts stands in their place too.
    """
    trained = (_rows(config, source, chat, is_open=False) for source in config.data.sources)
    held_out = (_rows(config, source, chat, is_open=True) for source in config.data.held_out)
    return max((*trained, *held_out))


def _largest(config: RunConfig, source: SourceConfig, chat: ChatRows) -> Largest:
    return find_task(source.task).largest(task_limits(config, source), source.in_context_examples, chat)


def _rows(config: RunConfig, source: SourceConfig, chat: ChatRows, *, is_open: bool) -> int:
    largest = _largest(config, source, chat)
    compressed = largest.context_tokens if is_open else _compressed(config, largest)
    return 1 + chat.first + largest.said_rows + compressed


def _compressed(config: RunConfig, largest: Largest) -> int:
    """Most compressed rows of the contexts of a sample, their markers included."""
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
                f"{key}.{name} is {value}, but only sources of the task {owner} use it, and this one's is "
                f"{source.task}. Set task: {owner}, or remove it."
            )


def _limit_problems(config: RunConfig) -> Iterator[str]:
    """A micro-batch has to hold the largest sample of every source."""
    data = config.data
    sizes = [largest_sample(config, source) for source in data.sources]
    limits = {"data.max_encoder_tokens": data.max_encoder_tokens, "data.max_decoder_rows": data.max_decoder_rows}
    for which, (key, limit) in enumerate(limits.items()):
        idx = max(range(len(sizes)), key=lambda idx: sizes[idx][which])
        task = find_task(data.sources[idx].task)
        if limit is not None and limit < sizes[idx][which]:
            yield (
                f"{key} is {limit}; expected {sizes[idx][which]} or more. A sample of data.sources.{idx} ({task.name}) "
                f"can be so large: raise {key}, lower {task.size_keys}; null sets no limit."
            )

"""Prompts of samples: the choice of in-context examples, and the texts around documents.

"blocks" (paper, appendix C): `Document: …`, `Question: …` and `Answer: …` lines, blocks joined by an empty line, the
last answer open, without a space after the colon. Closed book leaves the Document lines out. "long" (ZeroSCROLLS): the
document, the instruction, the question and the label of the answer, each label on a line of its own.

These details of the reference are not re-created: a space after the last colon of translations, and documents of
examples that are not stripped (its open-book baselines); the word Document twice before the question after exactly one
example (ARC); a note that a long document was shortened. Systems write prompts in a chat's turns (`systems/chat.py`).
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from arc_ds.data.order.randomness import permutation, random_words
from arc_ds.errors import ConfigError, DataError
from arc_ds.evaluation.metrics import metrics_of
from arc_ds.evaluation.protocol import Protocol
from arc_ds.evaluation.sample import Document, EvalPrompt, EvalSample, Said
from arc_ds.evaluation.task import EvalTask

logger = logging.getLogger(__name__)

_BETWEEN = "\n\n"
_BLANK_LINES = re.compile(r"\n\s*\n")
_REFERENCE_DRAW = 0.42  # the reference's `random` argument of shuffle: a constant
_MAX_NAMED = 5


def make_prompts(
    task: EvalTask,
    samples: Sequence[EvalSample],
    examples: Sequence[EvalSample] | None,
    protocol: Protocol,
    *,
    uses_documents: bool = True,
    num_examples: int | None = None,
    num_passages: int | None = None,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[EvalPrompt]:
    """The prompts of the tested samples, in the order of `samples`.

    No prompt has an example that asks what its sample asks. Such examples are not drawn from `examples`; without
    `examples`, such samples are left out. A warning counts both.

    task: the task of all samples.
    samples: all samples of the tested file, in its order.
    examples: samples of the task's split for examples; None: some of `samples`, which are then not tested. The protocol
        `examples: reference` always takes them out of `samples`.
    protocol: `examples`, `closed_book_seam` and `stop_at_blank_line` shape prompts. References and Qasper's questions
        are the reader's choice, the case of BLEU the scorer's.
    uses_documents: False for closed book.
    num_examples: in-context examples; None: the task's number. "long" has none.
    num_passages: passages of a document; None: the task's number.
    max_new_tokens: limit of an answer; None: the task's.
    limit: number of tested samples of each group; None: all.
    seed: seed of the choice of examples and of tested samples. The reference's choice has none.

    Raises DataError if there are too few examples, or if a passage or a question is missing. Raises ConfigError for
    `examples: per_sample` without `examples`.
    """
    count = 0 if task.layout == "long" else task.num_examples if num_examples is None else num_examples
    width = task.num_passages if num_passages is None else num_passages
    used = [*samples, *(examples or ())]
    if uses_documents and (lacking := [sample.id for sample in used if not sample.passages]):
        raise DataError(
            f"{task.name}: {len(lacking)} samples have no passage: {', '.join(lacking[:_MAX_NAMED])}. Pass a file with "
            "retrieved passages (`passages` or `ctxs`), or evaluate closed-book systems only."
        )
    if task.labels[1] and (lacking := [sample.id for sample in used if not sample.question]):
        raise DataError(
            f"{task.name}: {len(lacking)} samples have no question: {', '.join(lacking[:_MAX_NAMED])}. Add their "
            "questions to the file, or remove them."
        )
    chosen = choose_examples(task, samples, examples, protocol, num_examples=count, limit=limit, seed=seed)
    stop = task.stop
    if task.layout == "long" and not protocol.stop_at_blank_line:  # the reference does not cut long-context answers
        stop = tuple(text for text in stop if text != _BETWEEN)
    most = task.max_new_tokens if max_new_tokens is None else max_new_tokens
    write = _long_parts if task.layout == "long" else _block
    seam = _BETWEEN if uses_documents else protocol.closed_book_seam
    # The reference's closed book prompts begin with the surplus of its seam if they have no examples.
    surplus = "" if task.layout == "long" else seam.removeprefix(_BETWEEN)
    prompts = []
    for test in chosen:
        blocks = _example_parts(task, test.examples, seam, uses_documents, width)
        start = blocks or ([surplus] if surplus else [])
        parts = _joined((*start, *write(task, test.sample, uses_documents, width)))
        shared = parts[: 2 * uses_documents] if task.layout == "long" else _joined(blocks)  # up to the document
        prompts.append(EvalPrompt(sample=test.sample, parts=parts, max_new_tokens=most, stop=stop, shared=shared))
    return prompts


class PromptPlan(NamedTuple):
    """A tested sample and its in-context examples, in the order of the prompt."""

    sample: EvalSample
    examples: tuple[EvalSample, ...]


def choose_examples(
    task: EvalTask,
    samples: Sequence[EvalSample],
    examples: Sequence[EvalSample] | None,
    protocol: Protocol,
    *,
    num_examples: int,
    limit: int | None,
    seed: int,
) -> list[PromptPlan]:
    """The tested samples with their examples, in the order of `samples`. Arguments and errors: see `make_prompts`."""
    if protocol.examples == "reference":
        examples = None
    elif protocol.examples == "per_sample" and examples is None and num_examples:
        raise ConfigError(
            f"{task.name}: `examples: per_sample` draws from another split. Pass that split's file (`examples`), or "
            "set `examples: split`."
        )
    places = {id(sample): place for place, sample in enumerate(samples)}
    tests: list[PromptPlan] = []
    pools = None if examples is None else _by_group(examples)
    for group, own in _by_group(samples).items():
        pool = None if pools is None else pools.get(group, [])
        tests += _choose_in_group(task, own, pool, protocol, num_examples=num_examples, limit=limit, seed=seed)
    return sorted(tests, key=lambda test: places[id(test.sample)])


def _by_group(samples: Sequence[EvalSample]) -> dict[str, list[EvalSample]]:
    groups: defaultdict[str, list[EvalSample]] = defaultdict(list)
    for sample in samples:
        groups[sample.group].append(sample)
    return groups


def _choose_in_group(
    task: EvalTask,
    samples: Sequence[EvalSample],
    pool: Sequence[EvalSample] | None,
    protocol: Protocol,
    *,
    num_examples: int,
    limit: int | None,
    seed: int,
) -> list[PromptPlan]:
    if pool is not None:
        order = permutation(len(samples), seed, "tested samples", task.name).tolist()
        tested = [samples[idx] for idx in order[:limit]]
        pool = _without_tested(task, pool, tested) if num_examples else ()
        _check_number(task, len(pool), num_examples)
        if protocol.examples == "per_sample":
            return [PromptPlan(sample, _drawn(pool, num_examples, seed, task.name, sample.id)) for sample in tested]
        order = permutation(len(pool), seed, "examples", task.name).tolist()
        shared = tuple(pool[idx] for idx in order[:num_examples])
        return [PromptPlan(sample, shared) for sample in tested]
    if protocol.examples == "reference":
        order = reference_order(len(samples))
    else:
        order = permutation(len(samples), seed, "tested file", task.name).tolist()
    _check_number(task, len(samples) - 1, num_examples)
    shared, rest = tuple(samples[idx] for idx in order[:num_examples]), order[num_examples:]
    is_question = task.layout == "blocks" and metrics_of(task.name)[0] != "bleu"
    if protocol.examples == "reference" and is_question:
        rest.reverse()  # the reference tests the last questions first, but translations in their order
    keys = {key for example in shared for key in _keys(example)}
    tested = [samples[idx] for idx in rest]
    fresh = [sample for sample in tested if not keys.intersection(_keys(sample))]
    if len(fresh) < len(tested):
        logger.warning(
            "%s: left out %d samples that ask what one of their in-context examples asks",
            task.name,
            len(tested) - len(fresh),
        )
    return [PromptPlan(sample, shared) for sample in fresh[:limit]]


def reference_order(count: int) -> list[int]:
    """The reference's permutation: Python's old shuffle with a "random" number that is always 0.42.

    The first places are the in-context examples, the others are tested.
    """
    order = list(range(count))
    for place in range(count - 1, 0, -1):
        other = int(_REFERENCE_DRAW * (place + 1))
        order[place], order[other] = order[other], order[place]
    return order


def _drawn(pool: Sequence[EvalSample], count: int, seed: int, *key: str) -> tuple[EvalSample, ...]:
    """`count` different samples of the pool, a function of the key."""
    drawn: dict[int, None] = {}
    attempt = 0
    while len(drawn) < count:
        for word in random_words(2 * count, seed, "examples of a sample", *key, attempt).tolist():
            if len(drawn) < count:
                drawn.setdefault(word % len(pool))
        attempt += 1
    return tuple(pool[idx] for idx in drawn)


def _without_tested(task: EvalTask, pool: Sequence[EvalSample], tested: Sequence[EvalSample]) -> list[EvalSample]:
    """The pool without the samples that ask what a tested one asks."""
    keys = {key for sample in tested for key in _keys(sample)}
    fresh = [sample for sample in pool if not keys.intersection(_keys(sample))]
    if len(fresh) < len(pool):
        logger.warning(
            "%s: %d of %d samples for in-context examples ask what a tested sample asks, and are not drawn",
            task.name,
            len(pool) - len(fresh),
            len(pool),
        )
    return fresh


def _keys(sample: EvalSample) -> Iterator[tuple[str, str]]:
    """Two samples that share a key ask the same: one question about one passage, or one question with one answer.

    The question alone is no key, because all samples of a summarisation task share it.
    """
    question = (sample.question or "").casefold()
    if sample.passages:
        yield question, sample.passages[0]
    for reference in sample.references:
        yield question, reference.casefold()


def _check_number(task: EvalTask, available: int, wanted: int) -> None:
    if available < wanted:
        raise DataError(
            f"{task.name}: expected {wanted} in-context examples, found {max(available, 0)}. Pass a larger file, or "
            "lower `num_examples`."
        )


def _example_parts(
    task: EvalTask, examples: Sequence[EvalSample], seam: str, uses_documents: bool, num_passages: int | None
) -> list[str | Document]:
    """Blank lines in the answers of examples are left out: they would end an answer."""
    parts: list[str | Document] = []
    for idx, example in enumerate(examples):
        parts += _block(task, example, uses_documents, num_passages)
        parts.append(Said(f" {_BLANK_LINES.sub(chr(10), example.references[0])}"))
        parts.append(seam if idx == len(examples) - 1 else _BETWEEN)
    return parts


def _block(
    task: EvalTask, sample: EvalSample, uses_documents: bool, num_passages: int | None
) -> Iterator[str | Document]:
    document, question, answer = task.labels
    if uses_documents:
        yield f"{document}: "
        yield _document(sample, num_passages)
        yield "\n"
    yield f"{question}: {sample.question}\n"
    yield Said(f"{answer}:")


def _long_parts(
    task: EvalTask, sample: EvalSample, uses_documents: bool, num_passages: int | None
) -> Iterator[str | Document]:
    document, question, answer = task.labels
    if uses_documents:
        yield f"{document}:\n"
        yield _document(sample, num_passages)
        yield _BETWEEN
    instruction = sample.instruction or task.instruction
    yield instruction if instruction.endswith("\n") else instruction + _BETWEEN
    if question:
        yield f"{question}:\n{sample.question}{_BETWEEN}"
    yield Said(f"{answer}:\n")


def _document(sample: EvalSample, num_passages: int | None) -> Document:
    """The first passages, joined by a newline."""
    return Document("\n".join(passage.strip() for passage in sample.passages[:num_passages]))


def _joined(parts: Iterable[str | Document]) -> tuple[str | Document, ...]:
    """The parts with neighbouring texts of one kind joined."""
    joined: list[str | Document] = []
    for part in parts:
        before = joined[-1] if joined else None
        if isinstance(part, str) and isinstance(before, str) and type(part) is type(before):
            joined[-1] = type(part)(before + part)
        else:
            joined.append(part)
    return tuple(joined)

"""The plan of an evaluation: every prompt of every system, in batches that do not depend on the number of ranks."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from arc_ds.errors import DataError
from arc_ds.evaluation.config import TaskConfig
from arc_ds.evaluation.datasets import find_task
from arc_ds.evaluation.prompts import make_prompts
from arc_ds.evaluation.protocol import Protocol
from arc_ds.evaluation.sample import Document, EvalPrompt, EvalSample
from arc_ds.evaluation.shorten import shorten, with_document
from arc_ds.evaluation.systems.budget import Part
from arc_ds.evaluation.systems.system import KeepsWork, System
from arc_ds.evaluation.task import EvalTask
from arc_ds.system import dist

_MAX_NAMED = 5
_MIN_GROUP = 8  # prompts: smaller batches cost more than reading their examples again
CUT = "cut_document_characters"  # in `Prediction.lengths`


@dataclass(frozen=True, kw_only=True)
class LoadedTask:
    """A task of the config with its files read.

    samples: all samples of the tested file, in its order.
    examples: samples of the file for in-context examples; None if the config names none.
    """

    task: EvalTask
    config: TaskConfig
    samples: Sequence[EvalSample]
    examples: Sequence[EvalSample] | None

    def prompts(self, protocol: Protocol, seed: int, *, uses_documents: bool) -> list[EvalPrompt]:
        """The prompts of the samples that are asked. The arguments and errors are those of `make_prompts`."""
        return make_prompts(
            self.task,
            self.samples,
            self.examples,
            protocol,
            uses_documents=uses_documents,
            num_examples=self.config.num_examples,
            num_passages=self.config.num_passages,
            max_new_tokens=self.config.max_new_tokens,
            limit=self.config.max_samples,
            seed=seed,
        )


def load_task(config: TaskConfig, protocol: Protocol) -> LoadedTask:
    """Read the files of a task.

    Raises DataError if a file cannot be read, has another layout, has no samples, or has two samples with one id.
    """
    task = find_task(config.name)
    samples = list(task.read(Path(config.path), protocol))
    if not samples:
        raise DataError(f"{config.path} has no samples of task {config.name}. Give another path.")
    if doubles := [name for name, count in Counter(sample.id for sample in samples).items() if count > 1]:
        raise DataError(
            f"{config.path}: several samples have the id {', '.join(doubles[:_MAX_NAMED])}. Give each an id of its own."
        )
    examples = None if config.examples is None else list(task.read(Path(config.examples), protocol))
    return LoadedTask(task=task, config=config, samples=samples, examples=examples)


class PlannedPrompt(NamedTuple):
    """A prompt as a system gets it.

    place: place of the sample in its file.
    rows: decoder rows of the prompt and the longest answer.
    num_cut: characters of its document that were cut.
    """

    prompt: EvalPrompt
    place: int
    rows: int
    num_cut: int


class Batch(NamedTuple):
    """Prompts that a system answers together, of one task. shared_rows: rows of each prompt that are read once."""

    system: str
    task: str
    prompts: tuple[PlannedPrompt, ...]
    shared_rows: int = 0

    @property
    def rows(self) -> int:
        """Decoder rows, with padding to the longest prompt."""
        return _num_rows(len(self.prompts), max(each.rows for each in self.prompts), self.shared_rows)


@dataclass(frozen=True, kw_only=True)
class EvalPlan:
    """The work of an evaluation.

    batches: in order.
    too_long: ids of the samples that exceed a system's window and are left out, by system and task.
    """

    batches: tuple[Batch, ...]
    too_long: Mapping[str, Mapping[str, Sequence[str]]]

    def summary(self) -> dict[str, Any]:
        """Counts and digests for `run.json`, by system and task."""
        shas: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        cut: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for batch in self.batches:
            shas[batch.system][batch.task] += [prompt_sha(each.prompt) for each in batch.prompts]
            cut[batch.system][batch.task] += sum(each.num_cut > 0 for each in batch.prompts)
        ids = [[batch.system, batch.task, [each.prompt.sample.id for each in batch.prompts]] for batch in self.batches]
        return {
            "samples": {system: {task: len(of) for task, of in tasks.items()} for system, tasks in shas.items()},
            "skipped": {"too long": {system: dict(tasks) for system, tasks in self.too_long.items()}},
            "shortened": {system: {k: n for k, n in tasks.items() if n} for system, tasks in cut.items()},
            "prompts": {s: {task: _sha(sorted(of)) for task, of in tasks.items()} for s, tasks in shas.items()},
            "batches": _sha(ids),
        }


def make_plan(
    systems: Sequence[System],
    tasks: Sequence[LoadedTask],
    protocol: Protocol,
    *,
    arc_names: Collection[str],
    seed: int,
    max_batch_rows: int,
) -> EvalPlan:
    """Plan the batches: by system and task in the config's order, then by rows (the longest first), then by id.

    Prompts with the same in-context examples stand in consecutive batches, which read the examples once. So do the
    questions on a long document. Other questions on one document stand next to each other, so that a batch compresses
    it once. The longest batch comes first, so a lack of memory shows at once. A prompt of a "long" task that exceeds
    the system's window is shortened by `protocol.truncation`. Other prompts that exceed it are left out and counted.

    arc_names: names of the ARC systems, which keep the head of a document under `truncation: reference`.
    seed: of the choice of examples.
    max_batch_rows: see `EvalConfig`.

    Raises DataError if prompts cannot be made of the samples.
    """
    batches: list[Batch] = []
    too_long: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    prompts_of = cache(lambda idx, uses_documents: tasks[idx].prompts(protocol, seed, uses_documents=uses_documents))
    for system in systems:
        kept: Part = "head" if system.name in arc_names else "tail"
        if protocol.truncation != "reference":
            kept = protocol.truncation
        for idx, loaded in enumerate(tasks):
            prompts = prompts_of(idx, system.uses_documents)
            place_of = {sample.id: place for place, sample in enumerate(loaded.samples)}
            is_reference = protocol.truncation == "reference"
            fitted = _fitted(prompts, place_of, system, loaded.task, kept, is_reference=is_reference)
            planned = [each for each in fitted if each is not None]
            if len(planned) < len(prompts):
                left_out = [prompt.sample.id for prompt, each in zip(prompts, fitted, strict=True) if each is None]
                too_long[system.name][loaded.task.name] = left_out
            smallest = 2 if loaded.task.layout == "long" else _MIN_GROUP
            for group in _by_shared(_by_document(planned), smallest):
                shared = system.num_shared_rows(group[0].prompt) if isinstance(system, KeepsWork) else 0
                grouped = _grouped(group, shared, max_batch_rows)
                batches += [Batch(system.name, loaded.task.name, each, shared) for each in grouped]
    return EvalPlan(batches=tuple(batches), too_long=too_long)


def prompt_sha(prompt: EvalPrompt) -> str:
    """sha256 of the parts of a prompt and of the limits of its answer."""
    parts = [[type(part).__name__, part.text if isinstance(part, Document) else part] for part in prompt.parts]
    return _sha([parts, prompt.max_new_tokens, prompt.stop])


def _fitted(
    prompts: Sequence[EvalPrompt],
    place_of: Mapping[str, int],
    system: System,
    task: EvalTask,
    kept: Part,
    *,
    is_reference: bool,
) -> list[PlannedPrompt | None]:
    """The prompts, shortened to the window; None for those that do not fit.

    All questions on one document get the same part of it: the one that fits the longest question. The reference cuts
    the document for each question apart.

    place_of: places of the samples by id.
    kept: the part of a document that is kept.
    """
    bar = tqdm(prompts, f"plan {system.name}, {task.name}", leave=False, disable=None if dist.is_main() else True)
    rows = [system.num_rows(prompt) + prompt.max_new_tokens for prompt in bar]
    found: list[PlannedPrompt | None] = [None] * len(rows)
    texts: dict[tuple[str, ...], str] = {}  # the part of each document
    for idx in sorted(range(len(rows)), key=lambda idx: -rows[idx]):
        prompt = prompts[idx]
        room = rows[idx] if system.max_rows is None else system.max_rows
        shorter: EvalPrompt | None = prompt
        if rows[idx] > room:
            text = None if is_reference else texts.get(prompt.sample.passages)
            shorter = None if text is None else with_document(prompt, text)
            if shorter is None or system.num_rows(shorter) + prompt.max_new_tokens > room:
                most = room - prompt.max_new_tokens
                shorter = shorten(prompt, system, most, kept) if task.layout == "long" and most > 0 else None
        if shorter is not None:
            texts.setdefault(prompt.sample.passages, "".join(_documents(shorter)))
            num_rows = rows[idx] if shorter is prompt else system.num_rows(shorter) + prompt.max_new_tokens
            num_cut = sum(map(len, _documents(prompt))) - sum(map(len, _documents(shorter)))
            found[idx] = PlannedPrompt(shorter, place_of[prompt.sample.id], num_rows, num_cut)
    return found


def _documents(prompt: EvalPrompt) -> list[str]:
    return [part.text for part in prompt.parts if isinstance(part, Document)]


def _by_document(planned: Sequence[PlannedPrompt]) -> list[PlannedPrompt]:
    """The prompts by their number of rows, the longest first, then by id. Those on one document follow its longest."""
    groups: dict[object, list[PlannedPrompt]] = {}
    for each in sorted(planned, key=lambda each: (-each.rows, each.prompt.sample.id)):
        prompt = each.prompt
        has_document = any(isinstance(part, Document) for part in prompt.parts)
        groups.setdefault(prompt.sample.passages if has_document else prompt.sample.id, []).append(each)
    return [each for group in groups.values() for each in group]


def _by_shared(planned: Sequence[PlannedPrompt], smallest: int) -> list[list[PlannedPrompt]]:
    """The prompts by their shared parts. Those whose parts fewer than `smallest` prompts share are one group."""
    counts = Counter(each.prompt.shared for each in planned)
    groups: defaultdict[tuple[str | Document, ...], list[PlannedPrompt]] = defaultdict(list)
    for each in planned:
        shared = each.prompt.shared
        if counts[shared] < smallest:
            shared, each = (), each._replace(prompt=replace(each.prompt, shared=()))
        groups[shared].append(each)
    return list(groups.values())


def _grouped(planned: Sequence[PlannedPrompt], shared: int, max_rows: int) -> Iterator[tuple[PlannedPrompt, ...]]:
    """Cut a list into batches of at most `max_rows` rows, of which each prompt shares the first ones."""
    first, longest = 0, 0
    for place, each in enumerate(planned):
        longest = max(longest, each.rows)
        if place > first and _num_rows(place + 1 - first, longest, shared) > max_rows:
            yield tuple(planned[first:place])
            first, longest = place, each.rows
    if planned:
        yield tuple(planned[first:])


def _num_rows(num_prompts: int, longest: int, shared: int) -> int:
    """Decoder rows of a batch, with padding to the longest prompt. Shared rows are there once."""
    return num_prompts * (longest - shared) + shared


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()

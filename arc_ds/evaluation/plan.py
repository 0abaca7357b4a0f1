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
from arc_ds.evaluation.shorten import shorten
from arc_ds.evaluation.systems.budget import Part
from arc_ds.evaluation.systems.system import System
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
    """Prompts that a system answers together: of one task, the longest first."""

    system: str
    task: str
    prompts: tuple[PlannedPrompt, ...]

    @property
    def rows(self) -> int:
        """Decoder rows, with padding to the longest prompt."""
        return len(self.prompts) * self.prompts[0].rows


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

    Prompts with the same in-context examples stand in consecutive batches, which read the examples once. The longest
    batch comes first, so a lack of memory shows at once. A prompt of a "long" task that exceeds the
    system's window is shortened by `protocol.truncation`. Other prompts that exceed it are left out and counted.

    arc_names: names of the ARC systems, which keep the head of a document under `truncation: reference`.
    seed: of the choice of examples.
    max_batch_rows: see `EvalConfig`.

    Raises DataError if prompts cannot be made of the samples.
    """
    bar_off = None if dist.is_main() else True
    batches: list[Batch] = []
    too_long: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    prompts_of = cache(lambda idx, uses_documents: tasks[idx].prompts(protocol, seed, uses_documents=uses_documents))
    for system in systems:
        kept: Part = "head" if system.name in arc_names else "tail"
        if protocol.truncation != "reference":
            kept = protocol.truncation
        for idx, loaded in enumerate(tasks):
            place_of = {sample.id: place for place, sample in enumerate(loaded.samples)}
            planned = []
            prompts = prompts_of(idx, system.uses_documents)
            for prompt in tqdm(prompts, f"plan {system.name}, {loaded.task.name}", leave=False, disable=bar_off):
                found = _fit(prompt, place_of[prompt.sample.id], system, loaded.task, kept)
                if found is None:
                    too_long[system.name][loaded.task.name].append(prompt.sample.id)
                else:
                    planned.append(found)
            planned.sort(key=lambda each: (-each.rows, each.prompt.sample.id))
            for group in _by_examples(planned):
                batches += [Batch(system.name, loaded.task.name, each) for each in _grouped(group, max_batch_rows)]
    return EvalPlan(batches=tuple(batches), too_long=too_long)


def prompt_sha(prompt: EvalPrompt) -> str:
    """sha256 of the parts of a prompt and of the limits of its answer."""
    parts = [[type(part).__name__, part.text if isinstance(part, Document) else part] for part in prompt.parts]
    return _sha([parts, prompt.max_new_tokens, prompt.stop])


def _fit(prompt: EvalPrompt, place: int, system: System, task: EvalTask, kept: Part) -> PlannedPrompt | None:
    answer = prompt.max_new_tokens
    rows = system.num_rows(prompt) + answer
    if system.max_rows is None or rows <= system.max_rows:
        return PlannedPrompt(prompt, place, rows, 0)
    if task.layout != "long" or system.max_rows <= answer:
        return None
    found = shorten(prompt, system, system.max_rows - answer, kept)
    if found is None:
        return None
    shorter, num_cut = found
    return PlannedPrompt(shorter, place, system.num_rows(shorter) + answer, num_cut)


def _by_examples(planned: Sequence[PlannedPrompt]) -> list[list[PlannedPrompt]]:
    """The prompts by their in-context examples. Those whose examples few prompts have are one group without any."""
    counts = Counter(each.prompt.examples for each in planned)
    groups: defaultdict[tuple[str | Document, ...], list[PlannedPrompt]] = defaultdict(list)
    for each in planned:
        examples = each.prompt.examples
        if counts[examples] < _MIN_GROUP:
            examples, each = (), each._replace(prompt=replace(each.prompt, examples=()))
        groups[examples].append(each)
    return list(groups.values())


def _grouped(planned: Sequence[PlannedPrompt], max_rows: int) -> Iterator[tuple[PlannedPrompt, ...]]:
    """Cut a list that descends by rows into batches. The first prompt of a batch is its longest."""
    first = 0
    for place in range(1, len(planned) + 1):
        if place == len(planned) or (place + 1 - first) * planned[first].rows > max_rows:
            yield tuple(planned[first:place])
            first = place


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()

"""All tasks, found by their files: each module of `kinds` defines one as `TASK`."""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from itertools import combinations
from typing import Any

from arc_ds.data.tasks import kinds
from arc_ds.data.tasks.chat import PLAIN, Layout
from arc_ds.data.tasks.example import Example, ExampleSpec
from arc_ds.data.tasks.limits import TaskLimits
from arc_ds.data.tasks.task import Task
from arc_ds.errors import ConfigError
from arc_ds.tokenizers import Tokenizer


@cache
def all_tasks() -> Mapping[str, Task]:
    """The tasks by name, in alphabetical order. Raises ConfigError if two tasks share a sample name."""
    names = sorted(module.name for module in pkgutil.iter_modules(kinds.__path__))
    found: list[Task] = [import_module(f"{kinds.__name__}.{name}").TASK for name in names]
    for one, other in combinations(found, 2):
        for sample in set(one.samples) & set(other.samples):
            raise ConfigError(
                f"the tasks {one.name} and {other.name} both have samples named {sample!r}. Rename one of them in "
                f"{kinds.__name__}."
            )
    return {task.name: task for task in found}


def find_task(name: str) -> Task:
    """The task with that name. Raises ConfigError with the nearest name if there is none."""
    tasks = all_tasks()
    if name not in tasks:
        nearest = difflib.get_close_matches(name, tasks, n=1, cutoff=0.0)[0]
        raise ConfigError(f"the task is {name!r}; expected one of {', '.join(tasks)}. Did you mean {nearest}?")
    return tasks[name]


@cache
def task_of_sample(sample: str) -> Task:
    """The task that has samples of that name. Raises ValueError if there is none."""
    for task in all_tasks().values():
        if sample in task.samples:
            return task
    raise ValueError(f"no task has samples called {sample!r}; expected one of {', '.join(all_samples())}")


def all_samples() -> tuple[str, ...]:
    """The names of all samples."""
    return tuple(sample for task in all_tasks().values() for sample in task.samples)


def make_example(
    records: Sequence[dict[str, Any]],
    *,
    task: str,
    seed: int,
    encoder: Tokenizer,
    decoder: Tokenizer,
    limits: TaskLimits,
    layout: Layout = PLAIN,
) -> Example:
    """The example of some records: a pure function of its arguments.

    records: the sample's own first, then its in-context examples.
    task: the name of the sample, such as "reconstruction".
    seed: 64 bits for the example's own choices (window, number of passages, which answer).
    encoder, decoder: their tokenizers.
    limits: sizes.
    layout: the turns of the decoder's chat.

    Raises DataError if the record lacks something that the task needs. It is a TooShortError, which is a DataError, if
    the record is only too short.
    """
    return task_of_sample(task).example(records, ExampleSpec(task, seed, encoder, decoder, limits, layout))

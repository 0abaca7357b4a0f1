"""The tasks by name. To add a task, write a module with `TASKS` and add it here."""

from __future__ import annotations

from arc_ds.config.decode import nearest
from arc_ds.errors import ConfigError
from arc_ds.evaluation.datasets import (
    flores,
    long_summaries,
    narrativeqa,
    open_questions,
    own,
    qasper,
    squad,
    summaries,
    synthetic,
    triviaqa,
)
from arc_ds.evaluation.task import EvalTask

_MODULES = (
    open_questions, triviaqa, squad, flores, summaries, narrativeqa, qasper, long_summaries, synthetic, own,
)  # fmt: skip
TASKS: dict[str, EvalTask] = {task.name: task for module in _MODULES for task in module.TASKS}


def find_task(name: str) -> EvalTask:
    """The task of a name in `TASKS`, or of any pair of FLORES ("flores:eng-fra").

    Raises ConfigError, with the nearest name, if there is none.
    """
    family, colon, pair = name.partition(":")
    if family == "flores" and colon:
        return flores.flores_task(pair)
    if name not in TASKS:
        raise ConfigError(f"no evaluation task is called {name!r}. {nearest(name, TASKS)} Or flores:SOURCE-TARGET.")
    return TASKS[name]

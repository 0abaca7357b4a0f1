"""The tasks by name. To add a task, write a module with `TASKS` and add it here."""

from __future__ import annotations

from arc_ds.evaluation.task import EvalTask

TASKS: dict[str, EvalTask] = {}

"""Training tasks as pure functions: records become an example for one decoder (paper, section 4)."""

from arc_ds.data.tasks.example import NO_COUNTS, Example, TaskCounts, TooShortError
from arc_ds.data.tasks.limits import TaskLimits
from arc_ds.data.tasks.registry import make_example
from arc_ds.data.tasks.variants import closed, mismatched, open_

__all__ = [
    "NO_COUNTS",
    "Example",
    "TaskCounts",
    "TaskLimits",
    "TooShortError",
    "closed",
    "make_example",
    "mismatched",
    "open_",
]

"""The work of this process at the moment, for messages about a run that ends.

The main thread notes it; other threads read it while the main thread is blocked in C code.
"""

from __future__ import annotations

from dataclasses import dataclass

SAVING = "saving"


@dataclass
class Activity:
    """The latest note.

    step: number of the step from 1, or 0 before training.
    phase: "validation", or empty.
    module: the part of the step or of the run, such as "encoder layer 3", "optimizer step" or "saving".
    load: sizes of the micro-batch in words; empty outside a step.
    """

    step: int = 0
    phase: str = ""
    module: str = "starting"
    load: str = ""

    def __str__(self) -> str:
        return ", ".join(part for part in (f"step {self.step}" if self.step else "", self.phase, self.module) if part)


now = Activity()


def note(module: str, **more: int | str) -> None:
    """Record that this process begins a piece of work. more: new values of other fields."""
    now.module = module
    for name, value in more.items():
        setattr(now, name, value)

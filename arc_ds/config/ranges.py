"""The range of a field, written next to it: `Annotated[int, Range(at_least=1)]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a field accepts.

    at_least: inclusive lower bound.
    above: exclusive lower bound.
    below: exclusive upper bound.
    cure: a sentence for the error message, such as the meaning of 0.
    """

    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    cure: str = ""

    def holds(self, value: float) -> bool:
        """Whether a number is in the range."""
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        bounds = []
        if self.at_least is not None:
            bounds.append(f"{self.at_least} or more")
        if self.above is not None:
            bounds.append(f"more than {self.above}")
        if self.below is not None:
            bounds.append(f"less than {self.below}")
        return " and ".join(bounds)


Count = Annotated[int, Range(at_least=0)]
Positive = Annotated[int, Range(at_least=1)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(at_least=0)]

"""The range of a field, written next to it: `Annotated[int, Range(at_least=1)]`."""

from __future__ import annotations

import math
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

    at_least: float = -math.inf
    above: float = -math.inf
    below: float = math.inf
    cure: str = ""

    def holds(self, value: float) -> bool:
        """Whether a number is in the range."""
        return self.at_least <= value < self.below and value > self.above

    def __str__(self) -> str:
        bounds = {"{} or more": self.at_least, "more than {}": self.above, "less than {}": self.below}
        return " and ".join(words.format(bound) for words, bound in bounds.items() if math.isfinite(bound))


Count = Annotated[int, Range(at_least=0)]
Positive = Annotated[int, Range(at_least=1)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(at_least=0)]

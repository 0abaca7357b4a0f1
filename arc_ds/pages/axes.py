"""Places of ticks, and short texts of numbers and names."""

from __future__ import annotations

import math
from collections.abc import Sequence

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_DIGITS = 4


def number(value: float, digits: int = _DIGITS) -> str:
    """A number with at most `digits` digits. Large ones have a prefix: 12.3k."""
    if not math.isfinite(value):
        return str(value)
    rounded = abs(float(f"{value:.{digits}g}"))
    for size, prefix in _PREFIXES:
        if rounded >= max(size, 1e4):
            return f"{value / size:.{digits}g}{prefix}"
    return f"{value:.{digits}g}"


def without_middle(text: str, max_chars: int) -> str:
    """A long name loses its middle: names of systems and runs differ at both ends."""
    half = (max_chars - 1) // 2
    return text if len(text) <= max_chars else f"{text[:half]}…{text[-half:]}"


def tick_texts(values: Sequence[float]) -> list[str]:
    """The values as texts with as few digits as tell them apart, at least four."""
    found = ([number(value, digits) for value in values] for digits in range(_DIGITS, 17))
    return next((texts for texts in found if len(set(texts)) == len(values)), [str(value) for value in values])


def nice_ticks(low: float, high: float, num: int = 5) -> list[float]:
    """About `num` multiples of 1, 2 or 5 times a power of ten between two values."""
    step = 10.0 ** math.floor(math.log10((high - low) / num))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= num)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(idx * step, 12 - math.floor(math.log10(step))) for idx in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks between two positive values on a logarithmic axis.

    They are 1, 2 and 5 times powers of ten, or powers of ten if there are many, or multiples of one step if there are
    few.
    """
    powers = math.log10(high) - math.log10(low)
    if powers < 1:
        return [value for value in nice_ticks(low, high) if value > 0]
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1, max(1, round(powers / 10)))
    factors = (1, 2, 5) if powers < 2.5 else (1,)
    # A float literal, because 10.0**308 times 5 would be infinite, and 10.0**-324 is 0.
    values = [float(f"{factor}e{exponent}") for exponent in exponents for factor in factors]
    return [value for value in values if low <= value <= high]

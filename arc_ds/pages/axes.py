"""Places and texts of ticks."""

from __future__ import annotations

import math


def nice_ticks(low: float, high: float, num: int = 5) -> list[float]:
    """About `num` multiples of 1, 2 or 5 times a power of ten between two values."""
    step = 10.0 ** math.floor(math.log10((high - low) / num))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= num)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(idx * step, 12 - math.floor(math.log10(step))) for idx in range(first, last + 1)]


def log_ticks(low: float, high: float, factors: tuple[int, ...] = (1, 2, 5)) -> list[float]:
    """The factors times powers of ten between two positive values; `nice_ticks` if there are fewer than two."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    inside = [value for value in inside if low <= value <= high]
    return inside if len(inside) > 1 else nice_ticks(low, high)

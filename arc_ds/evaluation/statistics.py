"""Intervals and tests that respect clusters. Samples of one cluster share their errors, so clusters are drawn whole.

Random numbers are a function of a key, such as the name of a task. So all metrics and all systems of a task see the
same draws, and their differences are paired by construction.

Shapes: N samples, C clusters, K columns of statistics, R draws, S training seeds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cache
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_DRAWS = 10_000
_MIN_SEEDS = 3  # fewer training seeds say too little about their own spread
_MAX_BINS = 1 << 15  # more clusters than this share bins
_ROWS = 32  # draws at a time: their counts fit into the cache
_MAX_EXACT_CLUSTERS = 13  # all signs of 13 clusters are fewer than NUM_DRAWS
_MIN_PERCENTILE_CLUSTERS = 10
_MIN_EXPANSION_DEGREES = 9


def generator(key: str) -> np.random.Generator:
    """A random generator that depends on `key` alone."""
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def _binned(columns_CK: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sums over at most 32,768 bins of clusters. Bins of random clusters are independent, as clusters are.

    The clusters of a bin depend on C alone.
    """
    num_clusters = len(columns_CK)
    if num_clusters <= _MAX_BINS:
        return columns_CK
    order = generator(f"bins of {num_clusters}").permutation(num_clusters)
    return np.add.reduceat(columns_CK[order], np.arange(_MAX_BINS) * num_clusters // _MAX_BINS)


def bootstrap_sums(columns_CK: NDArray[np.float64], key: str, num_draws: int = NUM_DRAWS) -> NDArray[np.float64]:
    """Sums of statistics over drawn clusters, [R, K].

    Each draw takes C clusters with replacement. Statistics that are passed together, or with the same key and C, see
    the same draws.

    columns_CK: statistics, summed over the samples of each cluster.
    key: name of the draws.
    num_draws: R.
    """
    columns_CK = _binned(columns_CK)
    num_clusters, num_columns = columns_CK.shape
    random = generator(key)
    sums_RK = np.empty((num_draws, num_columns))
    for first in range(0, num_draws, _ROWS):
        num_rows = min(_ROWS, num_draws - first)
        drawn = random.integers(num_clusters, size=(num_rows, num_clusters))
        drawn += np.arange(num_rows)[:, None] * num_clusters
        counts_RC = np.bincount(drawn.ravel(), minlength=num_rows * num_clusters).reshape(num_rows, num_clusters)
        sums_RK[first : first + num_rows] = counts_RC.astype(np.float64) @ columns_CK
    return sums_RK


class Uncertainty(NamedTuple):
    """The uncertainty of a score, a difference or an average of them; all NaN if a task has one cluster.

    low, high: 95% interval.
    stderr: standard error.
    detectable: smallest difference that 80% of experiments of this size find; NaN if all draws are equal.
    p: two-sided p-value of Student's t for a value of 0, if the interval includes the spread of seeds; otherwise None.
    """

    low: float
    high: float
    stderr: float
    detectable: float
    p: float | None = None


def uncertainty(
    value: float,
    tasks: Sequence[tuple[NDArray[np.float64], int]],
    *,
    seeds: Sequence[NDArray[np.float64]] = (),
    stderr: float | None = None,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Uncertainty:
    """The uncertainty of a mean over tasks, by bootstrap over clusters.

    The interval of ten or more clusters is `percentile_interval`. Bootstrap draws of fewer clusters span too little for
    it: of two clusters half the intervals would hold the truth. These have `value` ± t · `stderr`.

    Three or more training seeds add the variance of their mean, and the interval is `value` ± t · `stderr`, too. Its
    degrees of freedom are those of Welch and Satterthwaite, so three seeds that differ much give a t of 4.3. Draws of
    three seeds with replacement would hold the truth in 80% of experiments only. Fewer seeds count as fixed: the
    interval holds for these seeds.

    value: the score of all samples.
    tasks: bootstrap draws [R] and number of clusters of each task.
    seeds: scores [S] of training seeds, one array for each independent set. `value` is a sum or difference of means.
    stderr: standard error over clusters in closed form, for one task; by default that of the draws.
    bounds: limits of the interval.
    """
    fewest = min(num_clusters for _, num_clusters in tasks)
    if fewest < 2:
        return Uncertainty(*[math.nan] * 4)
    parts = [(draws.var() / len(tasks) ** 2 * num / (num - 1), num - 1) for draws, num in tasks]
    if stderr is not None:
        parts = [(stderr**2, parts[0][1])]
    drawn_seeds = [seeds_S for seeds_S in seeds if len(seeds_S) >= _MIN_SEEDS]
    parts += [(seeds_S.var(ddof=1) / len(seeds_S), len(seeds_S) - 1) for seeds_S in drawn_seeds]
    total = float(sum(variance for variance, _ in parts))
    if total < 1e-18:  # rounding of equal draws
        return Uncertainty(value, value, 0.0, math.nan)
    degrees = total**2 / sum(variance**2 / degrees for variance, degrees in parts)
    error = math.sqrt(total)
    if drawn_seeds or fewest < _MIN_PERCENTILE_CLUSTERS:
        reach = student_quantile(0.975, degrees) * error
        low, high = value - reach, value + reach
    else:
        low, high = percentile_interval(np.mean([draws for draws, _ in tasks], axis=0), fewest)
    detectable = (student_quantile(0.975, degrees) + student_quantile(0.8, degrees)) * error
    p = student_p(value / error, degrees) if drawn_seeds else None
    return Uncertainty(max(low, bounds[0]), min(high, bounds[1]), error, detectable, p)


def percentile_interval(draws_R: NDArray[np.float64], num_clusters: int) -> tuple[float, float]:
    """The 95% interval of bootstrap draws over C clusters, ten or more.

    Its tails are percentiles of 2.5% for many clusters. Few clusters vary too little among themselves, as a sample's
    variance without Bessel's correction does: their percentiles lie further out, as those of Student's t do.

    Source: Hesterberg, "What teachers should know about the bootstrap" (arXiv 1411.5279), expanded percentile interval.
    """
    reach = math.sqrt(num_clusters / (num_clusters - 1)) * student_quantile(0.975, num_clusters - 1)
    tail = 100 * NormalDist().cdf(-reach)
    low, high = np.percentile(draws_R, (tail, 100 - tail))
    return float(low), float(high)


@cache
def student_quantile(probability: float, degrees: float) -> float:
    """A quantile of Student's t.

    probability: 0.5 or more.
    degrees: degrees of freedom, 1 or more; they need not be whole.
    """
    if degrees < _MIN_EXPANSION_DEGREES:
        angles, mass = _student_mass(0.0, math.pi / 2, degrees)
        return math.sqrt(degrees) * math.tan(np.interp((2 * probability - 1) * mass[-1], mass, angles))
    z = NormalDist().inv_cdf(probability)  # the expansion of Fisher and Cornish
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def student_p(t: float, degrees: float) -> float:
    """The two-sided p-value of a value t of Student's t. degrees: degrees of freedom, 1 or more."""
    angle = math.atan(abs(t) / math.sqrt(degrees))
    outside, inside = (_student_mass(*ends, degrees)[1][-1] for ends in ((angle, math.pi / 2), (0.0, angle)))
    return float(outside / (outside + inside))


def _student_mass(start: float, end: float, degrees: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Angles from `start` to `end`, and the mass of Student's t from `start` to each, up to a factor.

    t = sqrt(degrees) tan(angle), and the density of the angle is proportional to cos(angle)**(degrees - 1).
    """
    angles = np.linspace(start, end, 10_001)
    density = np.cos(angles).clip(0) ** (degrees - 1)
    return angles, np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])]) * (end - start)


def clustered_stderr(influence_N: NDArray[np.float64], clusters_N: NDArray[np.intp]) -> float:
    """The standard error of a sum of samples with the finite-cluster correction C / (C - 1); NaN for one cluster.

    influence_N: contribution of each sample to the estimate, with the sum 0: for a mean, (x - mean) / N.
    clusters_N: index of each sample's cluster.

    Source: Miller, "Adding error bars to evals" (arXiv 2411.00640), section 2.2.
    """
    sums_C = np.bincount(clusters_N, influence_N)
    num_clusters = len(sums_C)
    if num_clusters < 2:
        return float("nan")
    return float(np.sqrt(num_clusters / (num_clusters - 1) * np.square(sums_C).sum()))


def sign_flip_sums(columns_CK: NDArray[np.float64], key: str, num_draws: int = NUM_DRAWS) -> NDArray[np.float64]:
    """Sums over clusters with random signs, [R, K]. Up to 13 clusters have all 2**C signs in place of R draws.

    columns_CK: statistics, summed over the samples of each cluster.
    """
    columns_CK = _binned(columns_CK)
    num_clusters, num_columns = columns_CK.shape
    if num_clusters <= _MAX_EXACT_CLUSTERS:
        bits = np.arange(2**num_clusters)[:, None] >> np.arange(num_clusters) & 1
        return (2.0 * bits - 1.0) @ columns_CK
    random = generator(f"signs of {key}")
    sums_RK = np.empty((num_draws, num_columns))
    for first in range(0, num_draws, _ROWS):
        num_rows = min(_ROWS, num_draws - first)
        is_kept = random.integers(2, size=(num_rows, num_clusters), dtype=bool)
        sums_RK[first : first + num_rows] = np.where(is_kept, 1.0, -1.0) @ columns_CK
    return sums_RK


def permutation_p(statistic: float, draws_R: NDArray[np.float64], *, is_exact: bool) -> float:
    """Two-sided p-value of a statistic under its draws from the null hypothesis.

    is_exact: whether the draws are all permutations. Otherwise the observed one counts as one more draw.
    """
    num_extreme = int((np.abs(draws_R) >= abs(statistic) * (1 - 1e-9) - 1e-12).sum())
    return num_extreme / len(draws_R) if is_exact else (num_extreme + 1) / (len(draws_R) + 1)


def is_exact_flip(num_clusters: int) -> bool:
    """Whether `sign_flip_sums` gives all signs."""
    return num_clusters <= _MAX_EXACT_CLUSTERS


def mcnemar_p(num_first_only: int, num_second_only: int) -> float:
    """Exact two-sided p-value of McNemar's test: a binomial test on the samples that only one system has right."""
    num = num_first_only + num_second_only
    right = np.arange(min(num_first_only, num_second_only))
    terms = np.concatenate([[0.0], np.cumsum(np.log((num - right) / (right + 1)))])  # logs of binomial coefficients
    tail = terms.max() + math.log(np.exp(terms - terms.max()).sum()) - num * math.log(2)
    return min(1.0, 2 * math.exp(tail))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values, adjusted for their number by Holm's step-down method, in the same order."""
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted

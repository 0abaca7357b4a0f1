"""Intervals and tests that respect clusters. Samples of one cluster share their errors, so clusters are drawn whole.

Random numbers are a function of a key, such as the name of a task. So all metrics and all systems of a task see the
same draws, and their differences are paired by construction.

Shapes: N samples, C clusters, K columns of statistics, R draws, S training seeds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_DRAWS = 10_000
DETECTABLE = 2.8  # standard errors of a difference that is found in 80% of experiments: quantiles 0.975 and 0.8
_ROWS = 32  # draws at a time: their counts fit into the cache
_MAX_EXACT_CLUSTERS = 13  # all signs of 13 clusters are fewer than NUM_DRAWS


def generator(key: str) -> np.random.Generator:
    """A random generator that depends on `key` alone."""
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def bootstrap_sums(columns_CK: NDArray[np.float64], key: str, num_draws: int = NUM_DRAWS) -> NDArray[np.float64]:
    """Sums of statistics over drawn clusters, [R, K].

    Each draw takes C clusters with replacement. Statistics that are passed together, or with the same key and C, see
    the same draws.

    columns_CK: statistics, summed over the samples of each cluster.
    key: name of the draws.
    num_draws: R.
    """
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


def seed_weights(num_seeds: int, key: str, num_draws: int = NUM_DRAWS) -> NDArray[np.float64]:
    """Weights of training seeds in each draw, [R, S]: the outer level of a two-level bootstrap.

    With three or more seeds, each draw takes S of them with replacement. Fewer seeds say too little about their own
    spread: they have equal weights, and intervals then hold for these seeds only.
    """
    if num_seeds < 3:
        return np.full((num_draws, num_seeds), 1 / num_seeds)
    return generator(f"seeds of {key}").multinomial(num_seeds, [1 / num_seeds] * num_seeds, num_draws) / num_seeds


def percentile_interval(draws_R: NDArray[np.float64], num_clusters: int) -> tuple[float, float]:
    """The 95% interval of bootstrap draws; NaN for one cluster.

    Its tails are percentiles of 2.5% for many clusters. Few clusters vary too little among themselves, as a sample's
    variance without Bessel's correction does: their percentiles lie further out, as those of Student's t do.

    num_clusters: C; for an average over tasks, that of the task with the fewest clusters.

    Source: Hesterberg, "What teachers should know about the bootstrap" (arXiv 1411.5279), expanded percentile interval.
    """
    if num_clusters < 2:
        return float("nan"), float("nan")
    tail = 100 * NormalDist().cdf(-math.sqrt(num_clusters / (num_clusters - 1)) * student_quantile(num_clusters - 1))
    low, high = np.percentile(draws_R, (tail, 100 - tail))
    return float(low), float(high)


def student_quantile(degrees: int) -> float:
    """The 97.5% quantile of Student's t by the expansion of Fisher and Cornish; 1% too small for 3 degrees."""
    z = NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


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
    term, total = 1, 1  # binomial coefficients, exact
    for right in range(min(num_first_only, num_second_only)):
        term = term * (num - right) // (right + 1)
        total += term
    return min(1.0, 2 * total / 2**num)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values, adjusted for their number by Holm's step-down method, in the same order."""
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted

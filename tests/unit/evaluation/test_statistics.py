"""Intervals and tests against scipy, statsmodels and simulated experiments."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from statsmodels.regression.linear_model import OLS

from arc_ds.evaluation import statistics
from arc_ds.evaluation.statistics import (
    bootstrap_sums,
    clustered_stderr,
    holm,
    is_exact_flip,
    mcnemar_p,
    percentile_interval,
    permutation_p,
    sign_flip_sums,
    student_p,
    student_quantile,
    uncertainty,
)


def clustered_data(num_clusters: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Values that correlate within clusters of 1 to 9 samples, and their clusters."""
    random = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(num_clusters), random.integers(1, 10, num_clusters))
    return random.normal(size=num_clusters)[clusters] + random.normal(size=len(clusters)), clusters


def test_the_clustered_error_is_that_of_statsmodels() -> None:
    for seed in range(5):
        x, clusters = clustered_data(40, seed)
        ours = clustered_stderr((x - x.mean()) / len(x), clusters)
        fit = OLS(x, np.ones(len(x))).fit(cov_type="cluster", cov_kwds={"groups": clusters})
        assert ours == pytest.approx(fit.bse[0], rel=1e-10)
        assert ours > 1.3 * x.std(ddof=1) / len(x) ** 0.5  # the error of independent samples is too small
    assert np.isnan(clustered_stderr(np.zeros(3), np.zeros(3, dtype=np.intp)))


def test_the_bootstrap_interval_is_that_of_scipy() -> None:
    x = np.random.default_rng(0).exponential(size=300)
    low, high = percentile_interval(bootstrap_sums(x[:, None], "x")[:, 0] / len(x), len(x))
    interval = scipy.stats.bootstrap((x,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    assert (low, high) == pytest.approx((interval.low, interval.high), abs=0.05 * (high - low))


def test_quantiles_of_student_are_those_of_scipy() -> None:
    for degrees, tolerance in ((1, 1e-5), (1.4, 2e-5), (2.7, 1e-6), (8.9, 1e-6), (9, 2e-4), (100, 1e-6)):
        for probability in (0.8, 0.975):
            oracle = scipy.stats.t.ppf(probability, degrees)
            assert student_quantile(probability, degrees) == pytest.approx(oracle, rel=tolerance)


def test_few_clusters_have_wider_intervals() -> None:
    """Draws of a normal distribution have the error of a variance without Bessel's correction."""
    draws = scipy.stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    for num in (10, 50, 10**6):
        reach = (num / (num - 1)) ** 0.5 * scipy.stats.t.ppf(0.975, num - 1)
        assert percentile_interval(draws, num) == pytest.approx((-reach, reach), rel=1e-3)
    assert np.isnan(uncertainty(0.0, [(draws, 50), (draws, 1)])[:4]).all()


@pytest.mark.parametrize("num_clusters", [2, 5, 9])
def test_intervals_of_few_clusters_cover_the_truth_in_95_percent_of_experiments(num_clusters: int) -> None:
    x = np.random.default_rng(num_clusters).normal(size=(num_clusters, 2000))
    draws = bootstrap_sums(x, "few", 500).T / num_clusters
    found = [uncertainty(mean, [(each, num_clusters)]) for mean, each in zip(x.mean(axis=0), draws, strict=True)]
    low, high, stderr = np.array([each[:3] for each in found]).T
    assert np.mean((low <= 0) & (high >= 0)) == pytest.approx(0.95, abs=0.012)
    assert stderr.mean() == pytest.approx(x.std(axis=0, ddof=1).mean() / num_clusters**0.5, rel=0.03)


def test_three_seeds_have_the_interval_of_welch() -> None:
    """The difference of two means of independent samples has both errors: here those of seeds and of clusters."""
    random = np.random.default_rng(7)
    seeds, others, x = random.normal(5, 2, 3), random.normal(3, 1, 4), random.normal(0, 3, 40)
    draws = bootstrap_sums(x[:, None], "welch")[:, 0] / 40
    stderr = x.std(ddof=1) / 40**0.5
    for found, samples in (
        (uncertainty(seeds.mean() - x.mean(), [(draws, 40)], seeds=[seeds], stderr=stderr), (seeds, x)),
        (uncertainty(seeds.mean() - others.mean(), [(draws, 40)], seeds=[seeds, others], stderr=0), (seeds, others)),
    ):
        oracle = scipy.stats.ttest_ind(*samples, equal_var=False)
        interval = oracle.confidence_interval()
        assert found[:2] == pytest.approx((interval.low, interval.high), rel=1e-5)
        assert found.stderr == pytest.approx((samples[0].mean() - samples[1].mean()) / oracle.statistic)
        quantiles = scipy.stats.t.ppf((0.975, 0.8), oracle.df)
        assert found.detectable == pytest.approx(quantiles.sum() * found.stderr, rel=1e-4)
        assert found.p == pytest.approx(oracle.pvalue, rel=1e-4) and (found.p < 0.05) == (found.low * found.high > 0)
    for t, degrees in ((0.0, 4.0), (1e-3, 2.5), (3.0, 1.0), (2.1, 60.0), (9.0, 30.0), (-2.0, 1e4)):
        assert student_p(t, degrees) == pytest.approx(2 * scipy.stats.t.sf(abs(t), degrees), rel=1e-4)
    two = uncertainty(1.0, [(draws, 40)], seeds=[seeds[:2]], stderr=stderr)
    assert two == uncertainty(1.0, [(draws, 40)], stderr=stderr)  # two seeds are not drawn


def test_an_average_has_the_error_of_independent_tasks() -> None:
    random = np.random.default_rng(8)
    xs = [random.normal(0, 1, 5), random.normal(0, 2, 30)]
    draws = [bootstrap_sums(x[:, None], str(len(x)))[:, 0] / len(x) for x in xs]
    found = uncertainty(0.0, [(each, len(x)) for each, x in zip(draws, xs, strict=True)], bounds=(-0.1, 9.0))
    oracle = scipy.stats.ttest_ind(*xs, equal_var=False)  # the variance of a sum is that of a difference
    error = (xs[0].mean() - xs[1].mean()) / oracle.statistic / 2
    assert found.stderr == pytest.approx(error, rel=0.02) and found.low == -0.1
    assert found.high == pytest.approx(scipy.stats.t.ppf(0.975, oracle.df) * error, rel=0.03)


def test_many_clusters_are_drawn_in_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_MAX_BINS", 1 << 10)
    x = np.random.default_rng(0).exponential(size=(2500, 2))
    x[:50, 0] *= 30  # clusters next to each other belong to different bins
    x[:, 1] = 1.0
    sums = bootstrap_sums(x, "many", 1500)
    assert np.array_equal(bootstrap_sums(x[:, 1:], "many", 1500), sums[:, 1:])
    means = sums[:, 0] / sums[:, 1]
    assert np.unique(sums[:, 1]).size > 10  # bins have two or three clusters
    assert means.std() == pytest.approx(x[:, 0].std() / 2500**0.5, rel=0.1)
    assert means.mean() == pytest.approx(x[:, 0].mean(), rel=0.02)
    assert sign_flip_sums(x[:, 1:], "many", 1500).std() > 1.2 * 2500**0.5  # bins are flipped whole
    x[1::2, 0] *= -1
    flips = sign_flip_sums(x[:, :1], "many", 1500)
    assert flips.std() == pytest.approx(np.square(x[:, 0]).sum() ** 0.5, rel=0.1)


def test_systems_and_metrics_see_the_same_draws() -> None:
    x = np.random.default_rng(0).integers(0, 2, (50, 2)).astype(float)
    both = bootstrap_sums(x, "nq", 300)
    assert np.array_equal(both[:, :1], bootstrap_sums(x[:, :1], "nq", 300))
    assert np.array_equal(both[:100], bootstrap_sums(x, "nq", 100))
    assert np.array_equal(bootstrap_sums(np.ones((50, 1)), "nq", 300), np.full((300, 1), 50.0))
    assert not np.array_equal(both, bootstrap_sums(x, "squad", 300))


def test_draws_do_not_change_with_the_program() -> None:
    """Intervals of two versions are equal to the last digit."""
    sums = bootstrap_sums(np.arange(10.0)[:, None], "nq", 5)[:, 0]
    assert sums.tolist() == [48.0, 36.0, 53.0, 36.0, 46.0]


def test_the_interval_covers_the_truth_in_95_percent_of_experiments() -> None:
    """2,000 experiments of 60 clusters of unequal size: the columns of one matrix, so that one call draws for all."""
    num_experiments, num_clusters = 2000, 60
    random = np.random.default_rng(4)
    sizes = random.integers(1, 10, (num_clusters, num_experiments))
    means = random.beta(2, 3, (num_clusters, num_experiments))  # of the exact match of one cluster; its mean is 0.4
    right = random.binomial(sizes, means)
    sums = bootstrap_sums(np.hstack([right, sizes]).astype(float), "coverage", 1500)
    draws = (sums[:, :num_experiments] / sums[:, num_experiments:]).T
    low, high = np.array([percentile_interval(each, num_clusters) for each in draws]).T
    assert np.mean((low <= 0.4) & (high >= 0.4)) == pytest.approx(0.95, abs=0.01)

    value = right.sum(axis=0) / sizes.sum(axis=0)
    unclustered = 1.96 * np.sqrt(value * (1 - value) / sizes.sum(axis=0))
    assert np.mean(np.abs(value - 0.4) <= unclustered) < 0.92


def test_a_difference_of_the_smallest_detectable_size_is_found_in_80_percent_of_experiments() -> None:
    num_experiments, num_clusters = 1000, 120
    random = np.random.default_rng(5)
    sizes = random.integers(1, 6, (num_clusters, 1))
    differences = sizes * random.normal(size=(num_clusters, num_experiments)) + random.normal(
        size=(num_clusters, num_experiments)
    )
    stderr = np.sqrt((sizes**2 + 1).sum())  # of the sum over clusters
    planted = differences + 2.8 * stderr * sizes / sizes.sum()
    for values, wanted in ((planted, 0.8), (differences, 0.05)):
        draws = sign_flip_sums(values, "power", 1000)
        p = [
            permutation_p(total, draw, is_exact=False) for total, draw in zip(values.sum(axis=0), draws.T, strict=True)
        ]
        assert np.mean(np.array(p) <= 0.05) == pytest.approx(wanted, abs=0.03)


def test_mcnemar_is_scipys_binomial_test() -> None:
    small, large = (
        ((0, 0), (0, 1), (3, 3), (5, 1), (1, 5)),
        ((40, 61), (700, 800), (5000, 5300), (0, 2000), (10**6,) * 2),
    )
    for first, second in (*small, *large):
        num = first + second
        oracle = scipy.stats.binomtest(first, num).pvalue if num else 1.0
        assert mcnemar_p(first, second) == pytest.approx(oracle, rel=1e-9, abs=1e-300)


def test_flips_of_few_clusters_are_exact_and_of_many_close() -> None:
    random = np.random.default_rng(2)
    for num_clusters, tolerance in ((8, 1e-12), (13, 1e-12), (40, 0.02)):
        x = random.normal(0.3, 1, num_clusters)
        is_exact = is_exact_flip(num_clusters)
        ours = permutation_p(x.sum(), sign_flip_sums(x[:, None], "x")[:, 0], is_exact=is_exact)
        oracle = scipy.stats.permutation_test(
            (x,), np.sum, permutation_type="samples", n_resamples=np.inf if is_exact else 20_000, rng=1
        ).pvalue
        assert ours == pytest.approx(oracle, abs=tolerance)
    assert permutation_p(0.0, np.zeros(9), is_exact=False) == 1.0
    assert permutation_p(1.0, np.zeros(9), is_exact=False) == 0.1


def test_holm_rejects_step_by_step() -> None:
    """The k-th smallest of m p-values, from 0, is rejected at a level if it and all before are at most level/(m-k)."""

    def is_rejected(values: list[float], place: int, level: float) -> bool:
        order = sorted(range(len(values)), key=lambda each: values[each])
        upto = order.index(place) + 1
        return all(values[each] <= level / (len(values) - k) for k, each in enumerate(order[:upto]))

    for values in ([0.01], [0.01, 0.04, 0.03, 0.005], [0.5, 0.5, 0.9], [0.0, 1.0, 0.02]):
        for place, adjusted in enumerate(holm(values)):
            for level in np.linspace(0.0, 0.999, 700):
                assert is_rejected(values, place, level) == (adjusted <= level + 1e-12)
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02]) and holm([]) == []

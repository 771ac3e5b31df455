"""Pooled effects against a textbook example and against simulated data sets."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from iou_balanced_d2.analysis.comparison.meta_analysis import (
    Effect,
    detectable,
    pool_effects,
    seeds_needed,
)

# Trials of the BCG vaccine (Colditz et al. 1994): tuberculosis and no tuberculosis among the
# vaccinated, then among the others.
BCG = [
    (4, 119, 11, 128), (6, 300, 29, 274), (3, 228, 11, 209), (62, 13536, 248, 12619),
    (33, 5036, 47, 5761), (180, 1361, 372, 1079), (8, 2537, 10, 619), (505, 87886, 499, 87892),
    (29, 7470, 45, 7232), (17, 1699, 65, 1600), (186, 50448, 141, 27197), (5, 2493, 3, 2338),
    (27, 16886, 29, 17825),
]  # fmt: skip


def log_risk_ratios():
    effects = []
    for i, (a, b, c, d) in enumerate(BCG):
        variance = 1 / a - 1 / (a + b) + 1 / c - 1 / (c + d)
        effects.append(Effect(str(i), math.log(a / (a + b) * (c + d) / c), variance**0.5))
    return effects


def test_vaccine_trials_by_the_published_numbers():
    """Q, I^2 and Hedges's tau^2 as R's metafor publishes them for this data set."""
    pooled = pool_effects(log_risk_ratios())
    assert pooled.q == pytest.approx(152.2330, abs=1e-3)
    assert pooled.i_squared == pytest.approx(0.9212, abs=1e-4)
    assert pooled.q_p < 1e-4
    assert pooled.tau**2 == pytest.approx(0.3286, abs=1e-4)


def test_the_interval_of_random_effects_is_that_of_students_test():
    effects = log_risk_ratios()
    y = [e.value for e in effects]
    pooled = pool_effects(effects)
    expected = stats.ttest_1samp(y, 0.0)
    assert pooled.random.value == pytest.approx(np.mean(y))
    assert pooled.random.p == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval()
    assert (pooled.random.low, pooled.random.high) == pytest.approx(tuple(interval))
    reach = 2.2010 * (pooled.tau**2 + np.var(y, ddof=1) / 13) ** 0.5  # t, 11 degrees of freedom
    mean = np.mean(y)
    assert pooled.prediction == pytest.approx((mean - reach, mean + reach), abs=1e-4)


def test_equal_effects_do_not_shrink_the_interval():
    pooled = pool_effects([Effect(name, 1.0, 0.5) for name in "abc"])
    assert pooled.tau == pooled.i_squared == pooled.q == 0
    assert pooled.random.value == pooled.these.value == 1
    assert pooled.random.standard_error == pytest.approx(0.5 / 3**0.5)
    assert pooled.random.low < pooled.these.low == pytest.approx(1 - 1.96 * 0.5 / 3**0.5, abs=1e-3)
    assert math.isnan(pool_effects([Effect("a", 1.0, 0.5), Effect("b", 2.0, 0.5)]).prediction[0])


@pytest.mark.parametrize("effects", [
    [Effect("a", 1.0, 1.0)], [Effect("a", 1.0, 1.0), Effect("b", 1.0, 0.0)],
    [Effect("a", 1.0, 1.0), Effect("b", math.nan, 1.0)],
])  # fmt: skip
def test_what_can_not_be_pooled(effects):
    with pytest.raises(ValueError, match="two or more effects"):
        pool_effects(effects)


def simulated(rng, num_sets, *, tau=0.0, freedom=8, effect=0.0, ratio=3):
    """Data sets whose standard errors differ by ``ratio`` and are estimated as from few runs."""
    errors = np.linspace(1.5 / ratio, 1.5, num_sets)
    values = rng.normal(effect, np.hypot(tau, errors))
    measured = errors * (rng.chisquare(freedom, num_sets) / freedom) ** 0.5
    rows = zip(values, measured, strict=True)
    return [Effect("", value, error, freedom) for value, error in rows]


def coverage(num_sets, which, **case):
    rng = np.random.default_rng(0)
    pooled = [getattr(pool_effects(simulated(rng, num_sets, **case)), which) for _ in range(600)]
    return float(np.mean([p.low <= 0 <= p.high for p in pooled]))


def test_the_mean_of_these_data_sets_by_hand():
    """Welch's test has the same degrees of freedom: two means, their difference and their mean."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 1, 4), rng.normal(3, 2, 7)
    effects = [Effect("", x.mean(), x.std(ddof=1) / len(x) ** 0.5, len(x) - 1) for x in (a, b)]
    expected = stats.ttest_ind(a, -b, equal_var=False)  # the sum of the two
    low, high = expected.confidence_interval()
    these = pool_effects(effects).these
    assert these.value == pytest.approx((a.mean() + b.mean()) / 2)
    assert (these.low, these.high) == pytest.approx((low / 2, high / 2))
    assert these.p == pytest.approx(expected.pvalue)


@pytest.mark.parametrize("num_sets", [3, 6])
@pytest.mark.parametrize("freedom", [2, 4, 20])
def test_intervals_of_the_mean_of_these_data_sets_cover(num_sets, freedom):
    assert 0.93 <= coverage(num_sets, "these", freedom=freedom) <= 0.98


@pytest.mark.parametrize("num_sets", [3, 6])
@pytest.mark.parametrize(("tau", "most"), [(1.0, 1.0), (3.0, 0.985)])
@pytest.mark.parametrize("ratio", [3, 25])
def test_intervals_of_random_effects_cover(num_sets, tau, most, ratio):
    assert 0.93 <= coverage(num_sets, "random", tau=tau, ratio=ratio) <= most


@pytest.mark.parametrize("num_sets", [3, 6])
def test_intervals_of_random_effects_without_heterogeneity_are_wide(num_sets):
    """tau^2 is not below 0: few sets can't tell."""
    assert coverage(num_sets, "random") >= 0.95


def test_the_mean_of_these_says_little_of_others():
    assert coverage(6, "these", tau=3.0) < 0.6


@pytest.mark.parametrize("num_sets", [1, 4])
@pytest.mark.parametrize("of_images", [0.0, 0.3])
def test_so_many_seeds_find_the_gain(num_sets, of_images):
    """Variants drawn with the number of seeds found: four of five comparisons find the gain."""
    rng = np.random.default_rng(0)
    of_runs, gain = 2.0, 2.0  # of one run a variant
    pilot = Effect("", 0.0, (of_runs * 2 / 3 + of_images) ** 0.5, 4, 3, of_images)
    n = seeds_needed(gain, [pilot] * num_sets)
    runs = rng.normal(0, of_runs**0.5, (600, num_sets, 2, n))
    differences = gain + runs[:, :, 1].mean(axis=2) - runs[:, :, 0].mean(axis=2)
    differences += rng.normal(0, of_images**0.5, differences.shape)
    variance = runs.var(axis=3, ddof=1).mean(axis=2) * 2 / n + of_images
    found = np.mean(
        [estimate(d, v, n, of_images).p < 0.05 for d, v in zip(differences, variance, strict=True)]
    )
    assert 0.77 <= found <= 0.97  # a whole number of seeds is rarely just enough
    fewer = [of_runs * 2 / (n - 1) + of_images] * num_sets
    assert estimate([0.0] * num_sets, fewer, n - 1, of_images).detectable > gain


def estimate(differences, variances, num_runs, of_images):
    """The mean over data sets with so many runs of each variant."""
    effects = [
        Effect("", d, v**0.5, 2 * (num_runs - 1) / (1 - of_images / v) ** 2, num_runs, of_images)
        for d, v in zip(differences, variances, strict=True)
    ]
    if len(effects) > 1:
        return pool_effects(effects).these
    (e,) = effects
    p = 2 * stats.t.sf(abs(e.value) / e.standard_error, e.freedom)
    return SimpleNamespace(p=p, detectable=detectable(e.standard_error, e.freedom))


def test_the_seeds_needed_are_those_that_the_report_says_would_do():
    """Paired records: what three seeds could have detected takes three seeds."""
    measured = [Effect("", 0.0, s, 10, 3, freedom_of_run=5) for s in (0.4, 0.6, 0.9)]
    assert seeds_needed(pool_effects(measured).these.detectable * 1.001, measured) == 3
    assert seeds_needed(pool_effects(measured).these.detectable * 0.999, measured) == 4


def test_no_number_of_seeds_replaces_images():
    assert seeds_needed(1.0, [Effect("", 0.0, 1.0, 10, 3, 0.9)]) is None
    assert seeds_needed(1.0, [Effect("", 0.0, 1.0, 10, 3, 0.9)] * 12) is not None

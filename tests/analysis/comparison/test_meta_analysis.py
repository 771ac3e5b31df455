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
    """Fixed effect, Q and I^2 as R's metafor publishes them for this data set."""
    pooled = pool_effects(log_risk_ratios())
    assert pooled.fixed.value == pytest.approx(-0.4303, abs=1e-4)
    assert pooled.fixed.standard_error == pytest.approx(0.0405, abs=1e-4)
    assert pooled.q == pytest.approx(152.2330, abs=1e-3)
    assert pooled.i_squared == pytest.approx(0.9212, abs=1e-4)
    assert pooled.q_p < 1e-4
    # DerSimonian and Laird's tau^2 is .3088, with mean -.7141 and standard error .1787; Paule and
    # Mandel's lies close.
    assert pooled.tau**2 == pytest.approx(0.3088, abs=0.015)
    assert pooled.random.value == pytest.approx(-0.7141, abs=0.003)
    assert pooled.random.standard_error == pytest.approx(0.1787, abs=0.004)


def test_tau_and_the_interval_by_their_definitions():
    effects = log_risk_ratios()
    y = np.array([e.value for e in effects])
    pooled = pool_effects(effects)
    w = 1 / (np.array([e.standard_error for e in effects]) ** 2 + pooled.tau**2)
    mean = np.average(y, weights=w)
    assert (w * (y - mean) ** 2).sum() == pytest.approx(12)  # Paule and Mandel
    np.testing.assert_allclose(pooled.weights, w / w.sum())
    hartung_knapp = ((w * (y - mean) ** 2).sum() / 12 / w.sum()) ** 0.5
    reach = 2.1788 * hartung_knapp  # t, 12 degrees of freedom
    assert pooled.random.low == pytest.approx(mean - reach, abs=1e-4)
    assert pooled.random.high == pytest.approx(mean + reach, abs=1e-4)
    reach = 2.2010 * (pooled.tau**2 + hartung_knapp**2) ** 0.5
    assert pooled.prediction == pytest.approx((mean - reach, mean + reach), abs=1e-4)


def test_against_statsmodels():
    reason = "statsmodels, the oracle, is no requirement of the project"
    meta_analysis = pytest.importorskip("statsmodels.stats.meta_analysis", reason=reason)
    effects = log_risk_ratios()
    expected = meta_analysis.combine_effects(
        np.array([e.value for e in effects]),
        np.array([e.standard_error for e in effects]) ** 2,
        method_re="iterated",
        use_t=True,
    )
    pooled = pool_effects(effects)
    assert pooled.tau**2 == pytest.approx(expected.tau2, rel=1e-4)
    assert pooled.random.value == pytest.approx(expected.mean_effect_re, rel=1e-4)


def test_equal_effects_do_not_shrink_the_interval():
    pooled = pool_effects([Effect(name, 1.0, 0.5) for name in "abc"])
    assert pooled.tau == pooled.i_squared == pooled.q == 0
    assert pooled.random.value == pooled.fixed.value == 1
    assert pooled.random.standard_error == pytest.approx(0.5 / 3**0.5)
    assert pooled.random.low < pooled.fixed.low == pytest.approx(1 - 1.96 * 0.5 / 3**0.5, abs=1e-3)
    assert math.isnan(pool_effects([Effect("a", 1.0, 0.5), Effect("b", 2.0, 0.5)]).prediction[0])


@pytest.mark.parametrize("effects", [
    [Effect("a", 1.0, 1.0)], [Effect("a", 1.0, 1.0), Effect("b", 1.0, 0.0)],
    [Effect("a", 1.0, 1.0), Effect("b", math.nan, 1.0)],
])  # fmt: skip
def test_what_can_not_be_pooled(effects):
    with pytest.raises(ValueError, match="two or more effects"):
        pool_effects(effects)


def simulated(rng, num_sets, *, tau=0.0, freedom=8, effect=0.0):
    """Data sets whose standard errors differ threefold and are estimated as from few runs."""
    errors = np.linspace(0.5, 1.5, num_sets)
    values = rng.normal(effect, np.hypot(tau, errors))
    measured = errors * (rng.chisquare(freedom, num_sets) / freedom) ** 0.5
    rows = zip(values, measured, strict=True)
    return [Effect("", value, error, freedom) for value, error in rows]


def coverage(num_sets, which, **case):
    rng = np.random.default_rng(0)
    pooled = [getattr(pool_effects(simulated(rng, num_sets, **case)), which) for _ in range(600)]
    return float(np.mean([p.low <= 0 <= p.high for p in pooled]))


@pytest.mark.parametrize("num_sets", [3, 6])
@pytest.mark.parametrize("freedom", [8, 20])
def test_intervals_of_the_fixed_effect_cover(num_sets, freedom):
    assert 0.92 <= coverage(num_sets, "fixed", freedom=freedom) <= 0.98


@pytest.mark.parametrize("num_sets", [3, 6])
@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_intervals_of_random_effects_cover(num_sets, tau):
    assert 0.92 <= coverage(num_sets, "random", tau=tau) <= 0.985


@pytest.mark.parametrize("num_sets", [3, 6])
def test_intervals_of_random_effects_without_heterogeneity_are_wide(num_sets):
    """tau^2 is not below 0, and the factor not below 1: few sets can't tell."""
    assert coverage(num_sets, "random") >= 0.95


def test_the_fixed_effect_misses_where_sets_differ():
    assert coverage(6, "fixed", tau=3.0) < 0.6


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
    """The fixed effect of data sets with so many runs of each variant."""
    effects = [
        Effect("", d, v**0.5, 2 * (num_runs - 1) / (1 - of_images / v) ** 2, num_runs, of_images)
        for d, v in zip(differences, variances, strict=True)
    ]
    if len(effects) > 1:
        return pool_effects(effects).fixed
    (e,) = effects
    p = 2 * stats.t.sf(abs(e.value) / e.standard_error, e.freedom)
    return SimpleNamespace(p=p, detectable=detectable(e.standard_error, e.freedom))


def test_the_seeds_needed_are_those_that_the_report_says_would_do():
    """Paired records: what three seeds could have detected takes three seeds."""
    measured = [Effect("", 0.0, s, 10, 3) for s in (0.4, 0.6, 0.9)]
    assert seeds_needed(pool_effects(measured).fixed.detectable * 1.001, measured) == 3
    assert seeds_needed(pool_effects(measured).fixed.detectable * 0.999, measured) == 4


def test_no_number_of_seeds_replaces_images():
    assert seeds_needed(1.0, [Effect("", 0.0, 1.0, 10, 3, 0.9)]) is None
    assert seeds_needed(1.0, [Effect("", 0.0, 1.0, 10, 3, 0.9)] * 12) is not None

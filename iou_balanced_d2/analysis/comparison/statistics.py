"""Whether two sides differ by more than images and runs explain.

Two things make a difference of two AP uncertain: the images of the test set, and the training runs
(a second run of the same setting gives another AP). The first is measured by drawing images anew,
the same ones for all runs; the second by the spread of a side's runs. Neither contains the other:
drawing from two or three runs with replacement, as from images, finds too little spread.

Letters: S runs of a side, B resamples, M metrics.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from ...evaluation.detections import Array

LEVEL = 0.05
POWER = 0.8
# The least squared standard error, as a share of the variance over the images.
_LEAST_SHARE = 0.25
# Squared AP points: the images drawn give the same difference every time, but for rounding.
_NO_VARIANCE = 1e-12
# Satterthwaite's 2 is for many degrees of freedom. With the two of two runs a side it finds false
# differences in 7.6 % where it promises 5 %, and 1 in 3.7 %; this in 4.3 to 5.8 %.
_POWER_OF_RUNS = 1.25


class SideValues(NamedTuple):
    """The metrics of a side's runs, in percent; NaN where undefined."""

    plain: Array  # (S, M), of the test set as it is
    drawn: Array  # (S, B, M), of the images drawn; draw b is of the same images for all runs


class Spread(NamedTuple):
    """How far runs of the same setting lie apart, pooled over all sides."""

    variance: Array  # (M,), of runs on the same images; 0 where no side has two runs
    # (M,), the part of it that other images would change, and that the variance of the images
    # therefore contains already.
    of_images: Array
    freedom: int  # number of runs beyond the first of each side


class Difference(NamedTuple):
    """A side's metric minus the first side's, in percent points."""

    value: float  # the difference of the means over runs
    low: float  # lower end of the 95 % interval
    high: float  # upper end
    p: float  # two-sided
    standard_error: float  # of ``value``
    # Degrees of freedom of the t distribution that ``low``, ``high`` and ``p`` are of.
    freedom: float
    detectable: float  # the smallest true difference that is found with 80 % power at the 5 % level
    of_images: float  # the part of the squared ``standard_error`` that more runs would leave


def spread_of_runs(sides: Sequence[SideValues]) -> Spread:
    """Pool the variance of the runs of all sides, as if it was the same for all."""
    freedom = sum(len(side.plain) - 1 for side in sides)
    num_metrics = sides[0].plain.shape[1]
    variance, of_images = np.zeros(num_metrics), np.zeros(num_metrics)
    for side in sides:
        beyond = len(side.plain) - 1
        if beyond:
            moved = side.drawn - mean(side.drawn, axis=1)[:, None]
            variance += beyond / freedom * side.plain.var(axis=0, ddof=1)
            of_images += beyond / freedom * mean(moved.var(axis=0, ddof=1), axis=0)
    return Spread(variance, of_images, freedom)


def differences(
    first: SideValues, other: SideValues, spread: Spread, weights: Array
) -> list[Difference]:
    """Difference of two sides in each of M metrics.

    The squared standard error is S^2 of the runs over their number, plus the variance over the
    images drawn less the part of S^2 that is of images already. The reciprocal of t's degrees of
    freedom is the sum of those of images and runs, each times its share of the variance; the share
    of the runs to the power 1.25.

    ``weights`` (B, N) is how often each image was drawn. All fields are NaN where a metric is
    undefined; all but the value, where no draw changes it.
    """
    value = other.plain.mean(axis=0) - first.plain.mean(axis=0)
    drawn = other.drawn.mean(axis=0) - first.drawn.mean(axis=0)
    images, freedom_of_images = _variance_over_images(drawn, weights)
    share = 1 / len(first.plain) + 1 / len(other.plain)
    runs = share * spread.variance
    of_images = images - share * _small_sample(weights) * spread.of_images
    # Few runs can lie close together by chance.
    variance = np.maximum(of_images + runs, _LEAST_SHARE * images)
    of_images = np.clip(of_images, 0, variance)
    doubt = _share(images, variance) / freedom_of_images
    doubt += _share(runs, variance) ** _POWER_OF_RUNS / max(spread.freedom, 1)
    freedom = np.maximum(1 / doubt, 1)
    error, t = np.sqrt(variance), stats.t(freedom)
    reach = t.isf(LEVEL / 2) * error
    errors_away = np.divide(abs(value), error, out=np.full_like(error, math.inf), where=error > 0)
    p = np.where(value == 0, 1.0, 2 * t.sf(errors_away))
    detectable = reach + t.ppf(POWER) * error
    fields = (value, value - reach, value + reach, p, error, freedom, detectable, of_images)
    columns = np.stack(fields, axis=1)
    columns[np.isnan(value + error)] = np.nan
    # One image alone, or none that tells a difference: it is known, its uncertainty is not.
    columns[images < _NO_VARIANCE, 1:] = np.nan
    return [Difference(*row) for row in columns.tolist()]


def _variance_over_images(drawn: Array, weights: Array) -> tuple[Array, Array]:
    """Variance (M,) of metrics (B, M) between test sets of N images, and its degrees of freedom.

    The variance s^2 of N values is uncertain: Var(s^2) / s^4 = 2 / (N - 1) + excess / N, and 2 /
    degrees of freedom by Satterthwaite's definition. A metric's values are the images' influences,
    Cov(metric, how often the image is drawn) (Efron's infinitesimal jackknife, 2014). NaN where a
    metric is defined in fewer than two draws.
    """
    num_draws, num_images = weights.shape
    defined = ~np.isnan(drawn)
    number = defined.sum(axis=0)
    moved = np.where(defined, drawn - mean(drawn, axis=0), 0)
    variance = np.where(number > 1, (moved**2).sum(axis=0) / np.maximum(number - 1, 1), np.nan)
    influence = (weights - 1.0).T @ moved / np.maximum(number, 1)
    # The finite number of draws adds normal noise to it, which has no fourth cumulant.
    fourth_cumulant = (influence**4).mean(axis=0) - 3 * (influence**2).mean(axis=0) ** 2
    square = np.where(variance > 0, variance / num_images, np.inf) ** 2
    excess = np.maximum(fourth_cumulant / square, 0)
    reciprocal = 1 / max(num_images - 1, 1) + excess / (2 * num_images) + 1 / (num_draws - 1)
    return variance * _small_sample(weights), 1 / reciprocal


def _share(part: Array, whole: Array) -> Array:
    """Part / whole, at most 1; 1 where both are 0."""
    share = np.divide(part, whole, out=np.ones_like(whole), where=whole > 0)
    return np.minimum(share, 1)


def _small_sample(weights: Array) -> float:
    """N / (N - 1): a bootstrap's variance is that of N values about their own mean."""
    num_images = weights.shape[1]
    return num_images / max(num_images - 1, 1)


def verdict(name: str, first: str, difference: Difference) -> str:
    """What a difference in AP says, in one sentence."""
    d = difference
    if math.isnan(d.value):
        return f"{name} and {first} can't be compared: there is no object to find."
    if math.isnan(d.standard_error):
        return (
            f"{name} against {first}: AP {d.value:+.1f}, but how certain that is can't be told: "
            "it is the same whichever images are drawn."
        )
    numbers = f"AP {d.value:+.1f} [{d.low:.1f}, {d.high:.1f}], p {format_p(d.p)}"
    if d.p < LEVEL:
        return f"{name} {'beats' if d.value > 0 else 'is worse than'} {first}: {numbers}."
    return (
        f"{name} against {first}: no difference could be shown: {numbers}; one of "
        f"{d.detectable:.1f} AP would have been found with 80 % power."
    )


def format_number(value: float, form: str = ".2f") -> str:
    """A number as text; a dash where it is undefined."""
    return "–" if math.isnan(value) else format(value, form)


def format_p(p: float) -> str:
    """A p-value as text: ".004", "< .001", "1"."""
    if math.isnan(p):
        return "–"
    if p < 0.0005:
        return "< .001"
    return f"{p:.3f}".removeprefix("0") if p < 0.9995 else "1"


def mean(values: Array, axis: int) -> Array:
    """Mean of what is defined; NaN where nothing is."""
    defined = ~np.isnan(values)
    number = defined.sum(axis=axis)
    total = np.where(defined, values, 0).sum(axis=axis)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)

"""Whether two sides differ by more than images and runs explain.

Two things make a difference of two AP uncertain: the images of the test set, and the training runs
(a second run of the same setting gives another AP). The first is measured by drawing images anew,
the same ones for all runs; the second by the spread of a side's runs. Neither contains the other:
drawing from two or three runs with replacement, as from images, finds too little spread.

Letters: S runs of a side, B resamples, M metrics.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
LEVEL = 0.05
POWER = 0.8
_ANGLES = 20001


class SideValues(NamedTuple):
    """The metrics of a side's runs, in percent; NaN where undefined.

    Attributes:
        plain: (S, M), of the test set as it is.
        drawn: (S, B, M), of the images drawn; draw b is of the same images for all runs.
    """

    plain: Array
    drawn: Array


class Spread(NamedTuple):
    """How far runs of the same setting lie apart, pooled over all sides.

    Attributes:
        variance: (M,), of runs on the same images; 0 where no side has two runs.
        of_images: (M,), the part of it that other images would change, and that the variance of
            the images therefore contains already.
        freedom: number of runs beyond the first of each side.
    """

    variance: Array
    of_images: Array
    freedom: int


class Difference(NamedTuple):
    """A side's metric minus the first side's, in percent points.

    Attributes:
        value: the difference of the means over runs.
        low: lower end of the 95 % interval.
        high: upper end.
        p: two-sided.
        standard_error: of ``value``.
        freedom: degrees of freedom of the t distribution that ``low``, ``high`` and ``p`` are of.
        detectable: the smallest true difference that is found with 80 % power at the 5 % level.
    """

    value: float
    low: float
    high: float
    p: float
    standard_error: float
    freedom: float
    detectable: float


def spread_of_runs(sides: Sequence[SideValues]) -> Spread:
    """Pool the variance of the runs of each side.

    Args:
        sides: all of them; those of a single run tell nothing here.

    Returns:
        the spread, under the assumption that it is the same for all sides.
    """
    freedom = sum(len(side.plain) - 1 for side in sides)
    num_metrics = sides[0].plain.shape[1]
    variance, of_images = np.zeros(num_metrics), np.zeros(num_metrics)
    for side in sides:
        beyond = len(side.plain) - 1
        if beyond:
            moved = side.drawn - _mean(side.drawn, axis=1)[:, None]
            variance += beyond / freedom * side.plain.var(axis=0, ddof=1)
            of_images += beyond / freedom * _mean(moved.var(axis=0, ddof=1), axis=0)
    return Spread(variance, of_images, freedom)


def differences(
    first: SideValues, other: SideValues, spread: Spread, num_images: int
) -> list[Difference]:
    """Difference of two sides in each metric.

    The squared standard error is the variance of the difference over the images drawn, runs as they
    are, plus the runs' own variance, S^2 minus the part that is of images, over the number of runs
    of each side; not less than the former. t has Satterthwaite's degrees of freedom.

    Args:
        first: what is compared with.
        other: what is compared.
        spread: from :func:`spread_of_runs`.
        num_images: of the test set.

    Returns:
        M differences; all fields NaN where a metric is undefined.
    """
    value = other.plain.mean(axis=0) - first.plain.mean(axis=0)
    images = _variance(other.drawn.mean(axis=0) - first.drawn.mean(axis=0))
    share = 1 / len(first.plain) + 1 / len(other.plain)
    variance = images + share * np.maximum(spread.variance - spread.of_images, 0)
    doubt = images**2 / max(num_images - 1, 1)
    if spread.freedom:
        doubt = doubt + np.minimum(share * spread.variance, variance) ** 2 / spread.freedom
    freedom = np.divide(variance**2, doubt, out=np.ones_like(doubt), where=doubt > 0)
    return [_difference(*row) for row in zip(value, np.sqrt(variance), freedom, strict=True)]


def _difference(value: float, error: float, freedom: float) -> Difference:
    if math.isnan(value) or math.isnan(error):
        return Difference(*[math.nan] * len(Difference._fields))
    t = StudentT(max(freedom, 1.0))
    reach = t.quantile(1 - LEVEL / 2) * error
    if error > 0:
        p = t.two_sided(value / error)
    else:
        p = 1.0 if value == 0 else 0.0
    detectable = reach + t.quantile(POWER) * error
    fields = (value, value - reach, value + reach, p, error, freedom, detectable)
    return Difference(*map(float, fields))


class StudentT:
    """Student's t distribution, by its density cos^(n - 1) of the angle atan(t / sqrt n)."""

    def __init__(self, freedom: float):
        """Tabulate the distribution.

        Args:
            freedom: n degrees of freedom, 1 or more; need not be whole.
        """
        self._scale = math.sqrt(freedom)
        edges = np.linspace(-np.pi / 2, np.pi / 2, _ANGLES)
        density = np.cos((edges[1:] + edges[:-1]) / 2) ** (freedom - 1)
        below = np.concatenate([[0], np.cumsum(density)])
        self._angles, self._below = edges, below / below[-1]

    def quantile(self, share: float) -> float:
        """The t that a share of the distribution lies below."""
        return self._scale * math.tan(np.interp(share, self._below, self._angles))

    def two_sided(self, t: float) -> float:
        """Share of the distribution that is as far from 0 as ``t`` or farther."""
        angle = -math.atan(abs(t) / self._scale)
        return min(1.0, 2 * float(np.interp(angle, self._angles, self._below)))


def verdict(name: str, first: str, difference: Difference) -> str:
    """What a difference in AP says, in one sentence.

    Args:
        name: the side compared.
        first: the side compared with.
        difference: of their AP.
    """
    d = difference
    if math.isnan(d.value):
        return f"{name} and {first} can't be compared: there is no object to find."
    numbers = f"AP {d.value:+.1f} [{d.low:.1f}, {d.high:.1f}], p {format_p(d.p)}"
    if d.p < LEVEL:
        return f"{name} {'beats' if d.value > 0 else 'is worse than'} {first}: {numbers}."
    return (
        f"{name} against {first}: no difference could be shown: {numbers}; a difference under "
        f"{d.detectable:.1f} AP could not have been detected (80 % power)."
    )


def format_p(p: float) -> str:
    """A p-value as text: ".004", "< .001", "1"."""
    if math.isnan(p):
        return "–"
    if p < 0.0005:
        return "< .001"
    return f"{p:.3f}".removeprefix("0") if p < 0.9995 else "1"


def _variance(drawn: Array) -> Array:
    """(M,) variance over the draws (B, M) in which a metric is defined; NaN for fewer than two."""
    defined = ~np.isnan(drawn)
    number = defined.sum(axis=0)
    moved = np.where(defined, drawn - _mean(drawn, axis=0), 0)
    return np.where(number > 1, (moved**2).sum(axis=0) / np.maximum(number - 1, 1), np.nan)


def _mean(values: Array, axis: int) -> Array:
    """Mean of what is defined; NaN where nothing is."""
    defined = ~np.isnan(values)
    number = defined.sum(axis=axis)
    total = np.where(defined, values, 0).sum(axis=axis)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)

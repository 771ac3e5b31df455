"""One effect from the effects on several data sets, and what could have been detected.

Letters: k data sets, y_i the effect on one, v_i its squared standard error, f_i the degrees of
freedom of that.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from ...evaluation.detections import Array
from .statistics import LEVEL, POWER

_MOST_RUNS = 10_000


class Effect(NamedTuple):
    """The difference of two variants on one data set, in percent points."""

    name: str  #: of the data set
    value: float  #: the difference
    standard_error: float  #: of ``value``
    #: Degrees of freedom of ``standard_error``; infinite where it is known.
    freedom: float = math.inf
    num_runs: int = 1  #: of each variant
    of_images: float = 0.0  #: the part of the squared standard error that more runs would leave
    #: Degrees of freedom that one more run of each variant adds (as many as there are variants, or
    #: one less where runs are paired).
    freedom_of_run: int = 2

    def interval(self) -> tuple[float, float]:
        """The 95 % interval."""
        return _interval(self.value, self.standard_error, self.freedom)


class Estimate(NamedTuple):
    """An effect pooled over data sets."""

    value: float  #: the effect
    standard_error: float  #: of ``value``
    low: float  #: lower end of the 95 % interval
    high: float  #: upper end
    p: float  #: two-sided
    detectable: float  #: the smallest true effect that is found with 80 % power at the 5 % level


class Pooled(NamedTuple):
    """The mean effect, as that of these data sets and as that of all data sets like them."""

    these: Estimate  #: of these data sets alone
    random: Estimate  #: of data sets like these, which have other effects (random effects)
    #: Cochran's Q, chi-squared with k - 1 degrees of freedom where there is one effect only.
    q: float
    q_p: float  #: its p
    i_squared: float  #: (Q - (k - 1)) / Q, at least 0; the share of the spread beyond the errors'
    tau: float  #: standard deviation of the true effects between data sets
    #: Where 95 % of the true effects on other data sets are expected; NaN for k = 2.
    prediction: tuple[float, float]


def pool_effects(effects: Sequence[Effect]) -> Pooled:
    """The mean over data sets, each weighing alike.

    Weighted by precision, the mean would be that of the data set where all runs fail alike; and
    with errors that are estimated and differ much, the usual random effects (Paule and Mandel's
    tau^2) give intervals that are too short.

    These data sets: the errors added, with Welch and Satterthwaite's degrees of freedom. Random
    effects: Hartung and Knapp's interval with equal weights, which is Student's t of the k
    effects; tau^2 is Hedges and Olkin's (1985), and the interval is not shorter than with tau^2 0.

    Args:
        effects: of two data sets or more, all with a standard error above 0.

    Returns:
        the pooled effect.

    Raises:
        ValueError: for fewer than two, or a standard error that is 0 or undefined.
    """
    y = np.array([e.value for e in effects])
    v = np.array([e.standard_error for e in effects]) ** 2
    freedom = np.array([e.freedom for e in effects])
    if len(y) < 2 or not (np.isfinite(y) & (v > 0) & np.isfinite(v)).all():
        raise ValueError("expected two or more effects with standard errors above 0")
    beyond, value = len(y) - 1, float(y.mean())
    q = float(((y - np.average(y, weights=1 / v)) ** 2 / v).sum())
    tau2 = max(0.0, float(y.var(ddof=1) - v.mean()))
    error = math.sqrt((tau2 + v.mean()) / len(y))
    spread = math.hypot(math.sqrt(tau2), error)
    prediction = _interval(value, spread, beyond - 1) if beyond > 1 else (math.nan, math.nan)
    return Pooled(
        these=_of_these(value, v, freedom),
        random=_estimate(value, error, beyond),
        q=q,
        q_p=float(stats.chi2.sf(q, beyond)),
        i_squared=max(0.0, 1 - beyond / q) if q else 0.0,
        tau=math.sqrt(tau2),
        prediction=prediction,
    )


def _of_these(mean: float, v: Array, freedom: Array) -> Estimate:
    reciprocal = float((v**2 / freedom).sum() / v.sum() ** 2)
    return _estimate(mean, math.sqrt(v.sum()) / len(v), 1 / reciprocal if reciprocal else math.inf)


def _estimate(value: float, error: float, freedom: float) -> Estimate:
    low, high = _interval(value, error, freedom)
    p = 2 * float(stats.t.sf(abs(value) / error, freedom))
    return Estimate(value, error, low, high, p, detectable(error, freedom))


def _interval(value: float, error: float, freedom: float) -> tuple[float, float]:
    reach = float(stats.t.isf(LEVEL / 2, freedom)) * error
    return value - reach, value + reach


def detectable(standard_error: float, freedom: float) -> float:
    """The smallest true effect that is found with 80 % power at the 5 % level."""
    return float(stats.t.isf(LEVEL / 2, freedom) + stats.t.ppf(POWER, freedom)) * standard_error


def seeds_needed(gain: float, effects: Sequence[Effect]) -> int | None:
    """Runs of each variant and data set that a true effect is found with (80 % power, 5 % level).

    The mean over these data sets is meant, with as many runs on each. More runs shrink what is of
    runs, not what is of images.

    Args:
        gain: the true effect, above 0.
        effects: as measured, of one data set or more; their standard errors are what runs and
            images of these data sets give.

    Returns:
        the number; None where no number of runs is enough.
    """
    variance = np.array([e.standard_error**2 for e in effects])
    images = np.array([min(e.of_images, e.standard_error**2) for e in effects])
    of_one_run = np.array([e.num_runs for e in effects]) * (variance - images)
    of_a_run = np.array([e.freedom_of_run for e in effects])

    def enough(num_runs: int) -> bool:
        of_runs = of_one_run / num_runs
        # Images leave no doubt beside that of runs.
        share = np.maximum(of_runs / (images + of_runs), 1e-9)
        freedom = of_a_run * (num_runs - 1) / share**2
        return _of_these(0.0, images + of_runs, freedom).detectable <= gain

    if not (variance > 0).all() or not enough(_MOST_RUNS):
        return None
    return 2 + bisect_left(range(2, _MOST_RUNS), True, key=enough)

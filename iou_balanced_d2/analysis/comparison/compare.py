"""Does side B beat side A: AP of several runs, and differences with their uncertainty."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...data.conversion import read_bytes
from ...errors import UserError
from ...evaluation.detections import Array, GroundTruth, read_detections, read_ground_truth
from .bootstrap import Matches, draw_images, matches_of, metric_names, metrics_of, resampled_ap
from .runs import Annotations, Run, load_run
from .statistics import Difference, SideValues, differences, spread_of_runs, verdict


@dataclass(frozen=True)
class SideResult:
    """A side's metrics."""

    name: str  # what reports call it
    runs: tuple[str, ...]  # paths of its S runs
    values: Array  # (S, M) in percent; NaN where there is no object to find

    def mean(self) -> Array:
        """(M,) mean over runs."""
        mean: Array = self.values.mean(axis=0)
        return mean

    def deviation(self) -> Array:
        """(M,) standard deviation over runs; NaN for a single run."""
        if len(self.values) == 1:
            return np.full(self.values.shape[1], math.nan)
        deviation: Array = self.values.std(axis=0, ddof=1)
        return deviation


@dataclass(frozen=True)
class Comparison:
    """Sides, and the differences of all but the first from the first."""

    metrics: list[str]  #: M names, AP, AP50 to AP95, APs, APm, APl, and AP-<class>
    sides: list[SideResult]  #: the results of each
    differences: dict[str, list[Difference]]  #: side -> M differences; in the order of ``sides``
    datasets: dict[str, int]  #: data set -> its number of images
    resamples: int  #: how often images were drawn
    seed: int  #: of the drawing

    def verdicts(self) -> list[str]:
        """One sentence on AP for each side but the first."""
        first = self.sides[0].name
        return [verdict(name, first, found[0]) for name, found in self.differences.items()]


def compare_sides(
    sides: Mapping[str, Sequence[str | Path]],
    *,
    ground_truth: Mapping[str, str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Compare sides with the first of them.

    Args:
        sides: name -> run directories, or files of detections; see :func:`load_run`.
        ground_truth: data set -> JSON file; by default what the runs' configs name.
        resamples: how often images are drawn, at least 100.
        seed: of the drawing.

    Returns:
        the comparison.

    Raises:
        UserError: if there are fewer than two sides, or files are missing, broken or do not fit
            together.
    """
    if len(sides) < 2:
        raise UserError("nothing to compare with: name at least two sides")
    if resamples < 100:
        raise UserError(f"{resamples} resamples tell nothing: take 100 or more (1000 is usual)")
    if seed < 0:
        raise UserError(f"seed {seed}: expected 0 or more")
    for name, paths in sides.items():
        if not paths:
            raise UserError(f"side {name!r} has no run")
    loaded = {name: [load_run(p, ground_truth) for p in paths] for name, paths in sides.items()}
    runs = [run for side in loaded.values() for run in side]
    for side in loaded.values():
        _check_different(side)
    check_same_ground_truth(runs)
    truths = _read_ground_truths(runs[0].ground_truth)
    datasets = {name: len(truth.images) for name, truth in truths.items()}
    weights = draw_images(sum(datasets.values()), resamples, np.random.default_rng(seed))
    by_side = {name: _side_values(side, truths, weights) for name, side in loaded.items()}
    spread = spread_of_runs(list(by_side.values()))
    (_, first), *others = by_side.items()
    return Comparison(
        metrics=metric_names(next(iter(truths.values())).classes),
        sides=[
            SideResult(name, tuple(run.path for run in loaded[name]), values.plain)
            for name, values in by_side.items()
        ],
        differences={name: differences(first, other, spread, weights) for name, other in others},
        datasets=datasets,
        resamples=resamples,
        seed=seed,
    )


def run_metrics(path: str | Path) -> dict[str, float]:
    """AP, AP50, ... and of each class by name, in percent, of all of a run's data sets together."""
    run = load_run(path)
    truths = _read_ground_truths(run.ground_truth)
    every_image = np.ones((1, sum(len(truth.images) for truth in truths.values())), np.int32)
    values = metrics_of(resampled_ap(_matches(run, truths), every_image))[0]
    names = metric_names(next(iter(truths.values())).classes)
    return dict(zip(names, values.tolist(), strict=True))


def _check_different(runs: Sequence[Run]) -> None:
    """Make sure that no run counts twice in a side, whatever its path is spelled like."""
    known: dict[str, str] = {}
    for run in runs:
        file = os.path.realpath(run.path)
        if file in known:
            raise UserError(f"{known[file]!r} and {run.path!r} are one run: {file}")
        known[file] = run.path


def check_same_ground_truth(runs: Sequence[Run]) -> None:
    """Make sure that all runs were evaluated on the same objects."""
    first = runs[0]
    for run in runs[1:]:
        both = f"{first.path} and {run.path}"
        if run.ground_truth.keys() != first.ground_truth.keys():
            raise UserError(
                f"{both} have different data sets: {', '.join(first.ground_truth)} against "
                f"{', '.join(run.ground_truth)}; --ground-truth NAME=FILE names those to compare on"
            )
        for name, mine in run.ground_truth.items():
            other = first.ground_truth[name]
            if mine.difficult != other.difficult:
                raise UserError(
                    f"{both} treat difficult objects differently: VOC_DIFFICULT is "
                    f"{other.difficult!r} against {mine.difficult!r}"
                )
            if mine.path != other.path and read_bytes(mine.path) != read_bytes(other.path):
                raise UserError(
                    f"{both} have different ground truths of {name!r}: {other.path} against "
                    f"{mine.path}"
                )


def _read_ground_truths(ground_truth: Mapping[str, Annotations]) -> dict[str, GroundTruth]:
    """The objects of each data set; classes must be the same for all."""
    truths: dict[str, GroundTruth] = {}
    for name, annotations in ground_truth.items():
        truths[name] = read_ground_truth(annotations.path, annotations.difficult)
        first = next(iter(truths))
        if truths[name].classes != truths[first].classes:
            raise UserError(f"data sets {first!r} and {name!r} have different classes")
        if not truths[name].images:
            raise UserError(f"{annotations.path}: there are no images")
    return truths


def _side_values(
    runs: Sequence[Run], truths: Mapping[str, GroundTruth], weights: Array
) -> SideValues:
    # A first row of ones: the test set as it is.
    drawn = np.concatenate([np.ones_like(weights[:1]), weights])
    values = np.stack([metrics_of(resampled_ap(_matches(run, truths), drawn)) for run in runs])
    return SideValues(values[:, 0], values[:, 1:])


def _matches(run: Run, truths: Mapping[str, GroundTruth]) -> list[list[Matches]]:
    """Matches [K][A] of all data sets together."""
    return matches_of(
        [(truth, read_detections(run.detections[name], truth)) for name, truth in truths.items()]
    )

"""Does side B beat side A: AP of several runs, and differences with their uncertainty."""

import hashlib
import math
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.coco import class_names, read_coco_json
from ..errors import UserError
from . import comparison_report
from .bootstrap import draw_images, metric_names, metrics_of, resampled_ap
from .matching import Matches, Outcomes, match, pool, read_detections, read_ground_truth
from .runs import Annotations, Run, Side, load_side, read_curves
from .statistics import Difference, SideValues, differences, spread_of_runs, verdict

Array = NDArray[Any]
# Files of detections; above it processes of their own are worth their start.
_MANY_BYTES = 20_000_000


@dataclass(frozen=True)
class SideResult:
    """A side's metrics.

    Attributes:
        name: what reports call it.
        runs: paths of its S runs.
        values: (S, M) in percent; NaN where there is no object to find.
        curves: for each run, name -> (iteration, value); see :func:`read_curves`.
    """

    name: str
    runs: tuple[str, ...]
    values: Array
    curves: tuple[dict[str, list[tuple[int, float]]], ...]

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
    """Sides, and the differences of all but the first from the first.

    Attributes:
        metrics: M names: AP, AP50 to AP95, APs, APm, APl, and AP-<class>.
        sides: the results of each.
        differences: side -> M differences; in the order of ``sides``.
        datasets: data set -> its number of images.
        resamples: how often images were drawn.
        seed: of the drawing.
    """

    metrics: list[str]
    sides: list[SideResult]
    differences: dict[str, list[Difference]]
    datasets: dict[str, int]
    resamples: int
    seed: int

    def verdicts(self) -> list[str]:
        """One sentence on AP for each side but the first."""
        first = self.sides[0].name
        return [verdict(name, first, found[0]) for name, found in self.differences.items()]

    def markdown(self) -> str:
        """The report as Markdown."""
        return comparison_report.markdown(self)

    def html(self) -> str:
        """The report as one HTML page that holds its figures."""
        return comparison_report.html(self)

    def to_json(self) -> dict[str, Any]:
        """All numbers, as JSON values; null where undefined."""
        return comparison_report.to_json(self)

    def write(self, folder: str | Path) -> list[Path]:
        """Write comparison.md, .html and .json and the figures; returns the files."""
        return comparison_report.write(self, Path(folder))


def compare_sides(
    sides: Mapping[str, Sequence[str | Path]],
    *,
    ground_truth: Mapping[str, str] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Compare sides with the first of them.

    Args:
        sides: name -> run directories, or files of detections; see :func:`load_side`.
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
    loaded = [load_side(name, runs, ground_truth) for name, runs in sides.items()]
    runs = [run for side in loaded for run in side.runs]
    _check_same_ground_truth(runs)
    datasets, names = _read_datasets(runs[0].ground_truth)
    weights = draw_images(sum(datasets.values()), resamples, np.random.default_rng(seed))
    values = iter(_values_of_runs(runs, list(datasets.values()), weights))
    by_side = [_side_values([next(values) for _ in side.runs]) for side in loaded]
    spread = spread_of_runs(by_side)
    first, *others = by_side
    found = [differences(first, other, spread, weights) for other in others]
    return Comparison(
        metrics=metric_names(names),
        sides=[_result(side, v) for side, v in zip(loaded, by_side, strict=True)],
        differences=dict(zip([side.name for side in loaded[1:]], found, strict=True)),
        datasets=datasets,
        resamples=resamples,
        seed=seed,
    )


def _result(side: Side, values: SideValues) -> SideResult:
    curves = tuple(read_curves(run) for run in side.runs)
    return SideResult(side.name, tuple(run.path for run in side.runs), values.plain, curves)


def _side_values(runs: Sequence[tuple[Array, Array]]) -> SideValues:
    return SideValues(
        np.stack([plain for plain, _ in runs]), np.stack([drawn for _, drawn in runs])
    )


def _check_same_ground_truth(runs: Sequence[Run]) -> None:
    """Make sure that all runs were evaluated on the same objects.

    Raises:
        UserError: naming the two runs and what differs.
    """
    first = runs[0]
    digests = {name: _digest(a) for name, a in first.ground_truth.items()}
    for run in runs[1:]:
        if run.ground_truth.keys() != first.ground_truth.keys():
            raise UserError(
                f"{first.path} and {run.path} have different data sets: "
                f"{', '.join(first.ground_truth)} against {', '.join(run.ground_truth)}; "
                "--ground-truth NAME=FILE names those to compare on"
            )
        for name, annotations in run.ground_truth.items():
            expected = first.ground_truth[name]
            if annotations.difficult != expected.difficult:
                raise UserError(
                    f"{first.path} and {run.path} treat difficult objects differently: "
                    f"VOC_DIFFICULT is {expected.difficult!r} against {annotations.difficult!r}"
                )
            if annotations.path != expected.path and _digest(annotations) != digests[name]:
                raise UserError(
                    f"{first.path} and {run.path} have different ground truths of {name!r}: "
                    f"{expected.path} against {annotations.path}"
                )


def _digest(annotations: Annotations) -> str:
    try:
        return hashlib.sha256(Path(annotations.path).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{annotations.path}: can't be read: {error.strerror}") from error


def _read_datasets(ground_truth: Mapping[str, Annotations]) -> tuple[dict[str, int], list[str]]:
    """Data set -> number of images, and the classes, which must be the same for all.

    Raises:
        UserError: if they are not, or there is no image.
    """
    sizes: dict[str, int] = {}
    classes: dict[str, list[str]] = {}
    for name, annotations in ground_truth.items():
        content = read_coco_json(annotations.path)
        sizes[name] = len({image["id"] for image in content["images"]})
        classes[name] = class_names(content)
        first = next(iter(classes))
        if classes[name] != classes[first]:
            raise UserError(f"data sets {first!r} and {name!r} have different classes")
        if not sizes[name]:
            raise UserError(f"{annotations.path}: there are no images")
    return sizes, next(iter(classes.values()))


def _values_of_runs(
    runs: Sequence[Run], sizes: Sequence[int], weights: Array
) -> list[tuple[Array, Array]]:
    """Metrics (M,) of each run as it is, and (B, M) of the images drawn."""
    tasks = [
        (annotations.path, annotations.difficult, run.detections[name])
        for run in runs
        for name, annotations in runs[0].ground_truth.items()
    ]
    outcomes = iter(_match_all(tasks))
    ones = np.ones((1, weights.shape[1]), np.int32)
    values = []
    for _ in runs:
        matches = _pooled([next(outcomes) for _ in sizes], sizes)
        plain = metrics_of(resampled_ap(matches, ones))[0]
        values.append((plain, metrics_of(resampled_ap(matches, weights))))
    return values


def _match_all(tasks: Sequence[tuple[str, str, str]]) -> list[list[list[Outcomes]]]:
    """Outcomes [K][A] of each (ground truth, policy, detections)."""
    processes = min(len(tasks), os.cpu_count() or 1)
    if processes == 1 or sum(os.path.getsize(file) for *_, file in tasks) < _MANY_BYTES:
        return [_match_files(*task) for task in tasks]
    context = multiprocessing.get_context("spawn")  # threads of PyTorch survive no fork
    with ProcessPoolExecutor(processes, mp_context=context) as executor:
        return list(executor.map(_match_files, *zip(*tasks, strict=True)))


def _match_files(ground_truth: str, difficult: str, detections: str) -> list[list[Outcomes]]:
    coco = read_ground_truth(ground_truth, difficult)
    return match(coco, read_detections(detections, coco))


def _pooled(parts: Sequence[list[list[Outcomes]]], sizes: Sequence[int]) -> list[list[Matches]]:
    """Matches [K][A] of all data sets together."""
    offsets = np.cumsum([0, *sizes[:-1]]).tolist()
    return [
        [pool(outcomes, offsets) for outcomes in zip(*areas, strict=True)]
        for areas in zip(*parts, strict=True)
    ]

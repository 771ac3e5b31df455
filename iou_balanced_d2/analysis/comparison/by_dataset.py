"""Variants compared on several data sets: each set's differences, and the effect over all."""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from tabulate import tabulate

from ...data.coco_format import load_json
from ...data.conversion import read_bytes
from ...errors import UserError
from ...files import make_folder, write_atomically, write_text
from ..page import clean, markdown_text, plain
from ..plots import style
from .compare import compare_sides
from .forest_plot import forest_plot
from .meta_analysis import Effect, Estimate, Pooled, pool_effects, seeds_needed
from .runs import load_run
from .statistics import LEVEL, Difference, format_p

logger = logging.getLogger(__name__)

METRICS = ("AP", "AP50", "AP75", "AP85", "AP90")
# The gain in AP whose number of seeds is told: the least that the paper reports.
_GAIN = 1.0
_MANY = 10  # seeds; more are rarely run
Metrics = Mapping[str, float | None]


@dataclass(frozen=True)
class Against:
    """One variant against the first."""

    name: str  #: of the variant
    first: str  #: what it is compared with
    effects: dict[str, list[Effect]]  #: metric -> effects of the k data sets; NaN where undefined
    #: Metric -> the effect over the data sets; those where fewer than two tell one lack.
    pooled: dict[str, Pooled] = field(init=False)

    def __post_init__(self) -> None:
        usable = {m: [e for e in found if tells(e)] for m, found in self.effects.items()}
        pooled = {m: pool_effects(found) for m, found in usable.items() if len(found) > 1}
        object.__setattr__(self, "pooled", pooled)

    def verdict(self) -> str:
        """What the pooled difference in AP says."""
        effects = [e for e in self.effects["AP"] if tells(e)]
        if "AP" not in self.pooled:
            return f"{self.name} against {self.first}: too few data sets tell a difference in AP."
        random, these = self.pooled["AP"].random, self.pooled["AP"].these
        found = "no difference could be shown"
        if random.p < LEVEL:
            found = "better" if random.value > 0 else "worse"
        return (
            f"{self.name} against {self.first} on {_runs(effects)}: {found}: AP "
            f"{_cell(random)}, p {format_p(random.p)} over data sets like these, "
            f"{_interval(these)} on these alone. With 80 % power this finds a difference of "
            f"{random.detectable:.1f} AP over data sets like these, of {these.detectable:.1f} on "
            f"these alone. {seeds_sentence(effects)}"
        )

    def table(self) -> str:
        """Differences as Markdown, one row a data set, and the pooled ones below."""
        rows = [
            [markdown_text(sets[0].name), *(_effect_cell(e) for e in sets)]
            for sets in zip(*self.effects.values(), strict=True)
        ]
        pooled = [self.pooled.get(metric) for metric in self.effects]
        for name, text in _POOLED_ROWS.items():
            rows.append([name, *("–" if p is None else text(p) for p in pooled)])
        align = ["left", *["right"] * len(pooled)]
        headers = ["data set", *map(markdown_text, self.effects)]
        return tabulate(rows, headers, "pipe", colalign=align, disable_numparse=True)

    def to_json(self) -> dict[str, Any]:
        """All numbers; null where undefined."""
        found = self.effects.items()
        return {m: plain({"data_sets": e, "pooled": self.pooled.get(m)}) for m, e in found}


def seeds_sentence(effects: Sequence[Effect]) -> str:
    """How many seeds it takes to find a gain of 1 AP on these data sets."""
    where = "these data sets alone" if len(effects) > 1 else "this data set"
    if not all(map(tells, effects)):
        return "How many seeds a gain takes can't be told: AP has no spread here."
    if max(e.num_runs for e in effects) == 1:
        return "How many seeds a gain takes can't be told from one run of each variant."
    seeds = seeds_needed(_GAIN, effects)
    if seeds:
        hint = " Longer trainings often differ less from seed to seed." if seeds > _MANY else ""
        return f"To find +{_GAIN} AP on {where} takes {seeds} seeds of each variant.{hint}"
    return f"More seeds alone don't make +{_GAIN} AP detectable on {where}."


def tells(effect: Effect) -> bool:
    """Whether there is a difference with an error: not so where no run finds anything."""
    return math.isfinite(effect.value) and effect.standard_error > 0


def _runs(effects: Sequence[Effect]) -> str:
    """How many data sets, and how many runs a side has on each."""
    counts = {e.num_runs for e in effects}
    least, most = min(counts), max(counts)
    runs = f"{most} runs" if most > 1 else "1 run"
    return f"{len(effects)} data sets, {f'{least} to ' * (least < most)}{runs} each"


def _interval(estimate: Estimate) -> str:
    return f"[{estimate.low:.1f}, {estimate.high:.1f}]"


def _cell(estimate: Estimate) -> str:
    return f"{estimate.value:+.1f} {_interval(estimate)}"


def _effect_cell(effect: Effect) -> str:
    if not tells(effect):
        return "–"
    low, high = effect.interval()
    return f"{effect.value:+.1f} [{low:.1f}, {high:.1f}]"


_POOLED_ROWS = {
    "**mean, data sets like these**": lambda p: f"**{_cell(p.random)}**",
    "mean, these alone": lambda p: _cell(p.these),
    "I², τ": lambda p: f"{100 * p.i_squared:.0f} %, {p.tau:.1f}",
    "Q (p)": lambda p: f"{p.q:.1f} ({format_p(p.q_p)})",
    "another data set, 95 %": lambda p: (
        "–" if math.isnan(p.prediction[0]) else "[{:.1f}, {:.1f}]".format(*p.prediction)
    ),
}


def summary_table(found: Sequence[Against]) -> str:
    """The pooled effects of all variants as Markdown, two rows a variant."""
    rows = []
    for against in found:
        pooled = [against.pooled.get(metric) for metric in METRICS]
        random = ["–" if p is None else _cell(p.random) for p in pooled]
        these = ["–" if p is None else _cell(p.these) for p in pooled]
        rows.append([markdown_text(against.name), "like these", *random])
        rows.append([_runs(against.effects["AP"]), "these alone", *these])
    headers = [markdown_text(f"against {found[0].first}"), "data sets", *METRICS]
    align = ["left", "left", *["right"] * len(METRICS)]
    return tabulate(rows, headers, "pipe", colalign=align, disable_numparse=True)


def write(found: Sequence[Against], folder: str | Path) -> list[Path]:
    """Write ``by_dataset.md``, ``by_dataset.json`` and a forest plot of each variant.

    Args:
        found: from :func:`compare_records` or :func:`compare_runs_by_dataset`.
        folder: made if absent.

    Returns:
        the files.

    Raises:
        UserError: if they can't be written.
    """
    folder = make_folder(folder)
    files, parts = [folder / "by_dataset.md", folder / "by_dataset.json"], []
    if len(found) > 1:
        parts.append(f"{summary_table(found)}\n")
    for i, against in enumerate(found, start=1):
        title = f"{against.name} against {against.first}"
        name = re.sub(r"[^\w.-]", "_", clean(against.name))
        file = folder / f"forest_{name}.png"
        figure = forest_plot(title, against.effects, against.pooled, style(i)["color"])
        write_atomically(file, partial(figure.savefig, format="png"))
        files.append(file)
        parts.append(
            f"## {markdown_text(title)}\n\n{markdown_text(against.verdict())}\n\n"
            f"![{markdown_text(title)}]({quote(file.name)})\n\n{against.table()}\n"
        )
    write_text(files[0], "\n".join(parts))
    numbers = {against.name: against.to_json() for against in found}
    write_text(files[1], json.dumps(numbers, indent=1, allow_nan=False) + "\n")
    return files


def compare_records(paths: Sequence[str | Path]) -> list[Against]:
    """Compare the variants of runs whose records are at hand, without their detections.

    The uncertainty of a data set is that of seeds: a seed's runs of all variants have the same data
    in the same order, so a difference is the mean over the seeds that both variants have. Its error
    is the spread that is left once each variant and each seed has its own mean (two-way analysis of
    variance of all variants). Other test images would differ by more; between data sets they do,
    and that is in the random effects.

    Args:
        paths: JSON files of :mod:`iou_balanced_d2.experiments.evidence`, or any with "dataset",
            "variant", "seed" and "metrics" (AP, AP50, AP75, AP85, AP90). The others are compared
            with the variant "baseline", or, where there is none, with the first file's.

    Returns:
        each other variant against the first.

    Raises:
        UserError: if a file is broken, runs of one variant were not trained alike, those of one
            data set not tested on the same images, or there are fewer than two variants, data sets
            or seeds.
    """
    runs: dict[str, dict[str, dict[int, Metrics]]] = {}
    variants: dict[str, None] = {}
    known: dict[tuple[str, ...], tuple[str | Path, Any]] = {}
    for path in paths:
        record = _read_record(path)
        _check_alike(path, record, known)
        variant, seed = record["variant"], record["seed"]
        seeds = runs.setdefault(record["dataset"], {}).setdefault(variant, {})
        if seed in seeds:
            raise UserError(
                f"{path}: a second record of {record['dataset']}, {variant}, seed {seed}"
            )
        seeds[seed] = record["metrics"]
        variants[variant] = None
    first = "baseline" if "baseline" in variants else next(iter(variants))
    others = [variant for variant in variants if variant != first]
    found: dict[str, dict[str, list[Effect]]] = {other: {} for other in others}
    for dataset, by_variant in runs.items():
        for other in others:
            common = by_variant.get(first, {}).keys() & by_variant.get(other, {}).keys()
            if len(common) > 1:
                found[other][dataset] = _paired_effects(dataset, by_variant, first, other)
            else:
                logger.warning(
                    f"{dataset}: {first} and {other} have {len(common) or 'no'} seed in common: "
                    f"two or more are needed; {dataset} is left out for {other}"
                )
    return _against(first, found)


def _against(first: str, found: Mapping[str, Mapping[str, list[Effect]]]) -> list[Against]:
    """Of variant -> data set -> effects in the order of METRICS."""
    if not found:
        raise UserError("nothing to compare with: runs of two variants or more are needed")
    few = {
        name: f"{name} can be compared with {first} on {len(sets) or 'no'} data set: two or more "
        "are needed"
        for name, sets in found.items()
        if len(sets) < 2
    }
    if len(few) == len(found):
        raise UserError(next(iter(few.values())))
    for reason in few.values():
        logger.warning(f"{reason}; left out")
    return [
        Against(
            name,
            first,
            dict(zip(METRICS, map(list, zip(*sets.values(), strict=True)), strict=True)),
        )
        for name, sets in found.items()
        if name not in few
    ]


def _read_record(path: str | Path) -> dict[str, Any]:
    record: dict[str, Any] = load_json(str(path))
    kinds = {"dataset": str, "variant": str, "seed": int, "metrics": dict}
    for key, kind in kinds.items():
        if not isinstance(record, dict) or not isinstance(record.get(key), kind):
            raise UserError(f"{path}: not the record of a run: {key!r} is no {kind.__name__}")
    if not isinstance(record.get("settings", {}), dict):
        raise UserError(f"{path}: not the record of a run: 'settings' is no dict")
    for metric in METRICS:
        if not isinstance(record["metrics"].get(metric, ""), int | float | None):  # "": missing
            raise UserError(f"{path}: not the record of a run: metric {metric} is no number")
    return record


def _check_alike(
    path: str | Path, record: dict[str, Any], known: dict[tuple[str, ...], tuple[str | Path, Any]]
) -> None:
    """Raise an error for a record that an earlier one of ``known`` contradicts; adds this one.

    A variant's settings may differ by seed, as those of a control do, whose loss weight is
    measured; what they leave of the config may not.
    """
    dataset, variant = record["dataset"], record["variant"]
    settings = record.get("settings", {})
    facts = {
        ("DATASETS.TEST", dataset): settings.get("DATASETS.TEST"),
        ("iterations", dataset, variant): record.get("iterations"),
        ("config", dataset, variant, json.dumps(settings, sort_keys=True)): record.get("config"),
    }
    for group, value in facts.items():
        if value is None:  # not in every record
            continue
        other, expected = known.setdefault(group, (path, value))
        if value != expected:
            what = (
                f"{group[0]} of {', '.join(group[1:3])} is {value} in one, {expected} in the other"
            )
            if group[0] == "config":
                what = "they were trained with different configs, or by different versions"
            raise UserError(f"{path} and {other} can't be compared: {what}")


def _paired_effects(
    dataset: str, runs: Mapping[str, Mapping[int, Metrics]], first: str, other: str
) -> list[Effect]:
    seeds = sorted(runs[first].keys() & runs[other].keys())
    effects = []
    for metric in METRICS:
        values = {name: [_value(runs[name][s], metric) for s in seeds] for name in (first, other)}
        value = float(np.mean(values[other]) - np.mean(values[first]))
        square, freedom = _residual_square(runs, metric)
        error = math.sqrt(2 * square / len(seeds))
        effects.append(
            Effect(dataset, value, error, freedom, len(seeds), freedom_of_run=len(runs) - 1)
        )
    return effects


def _value(metrics: Metrics, metric: str) -> float:
    value = metrics[metric]
    return math.nan if value is None else float(value)


def _residual_square(runs: Mapping[str, Mapping[int, Metrics]], metric: str) -> tuple[float, int]:
    """Mean square that variants and seeds leave, and its degrees of freedom."""
    seeds = sorted({seed for by_seed in runs.values() for seed in by_seed})
    rows, values = [], []
    for v, by_seed in enumerate(runs.values()):
        for seed, metrics in by_seed.items():
            if math.isfinite(value := _value(metrics, metric)):
                rows.append([*np.eye(len(runs))[v], *np.eye(len(seeds))[seeds.index(seed)]])
                values.append(value)
    if not rows:
        return math.nan, 1
    design, y = np.array(rows), np.array(values)
    solution, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    freedom = len(y) - int(rank)
    square = float(((y - design @ solution) ** 2).sum()) / max(freedom, 1)
    # Equal numbers leave a remainder of rounding.
    return (square if square > 1e-12 else 0.0), freedom


def compare_runs_by_dataset(
    sides: Mapping[str, Sequence[str]], *, resamples: int = 1000, seed: int = 0
) -> list[Against]:
    """Compare sides whose runs are of several data sets, by their detections.

    The uncertainty of a data set is that of its images and of the runs, as in
    :func:`~iou_balanced_d2.analysis.comparison.compare_sides`.

    Args:
        sides: name -> OUTPUT_DIRs; which data set a run is of, its config says.
        resamples: how often images are drawn.
        seed: of the drawing.

    Returns:
        each other side against the first.

    Raises:
        UserError: if files are missing or do not fit together, or there are fewer than two sides or
            data sets.
    """
    runs: dict[str, dict[str, list[str]]] = {}
    known: dict[str, list[list[bytes]]] = {}  # names -> annotations of the sets called so
    for name, paths in sides.items():
        for run in map(load_run, paths):
            # Now: converting another set of this name may replace the file.
            contents = [read_bytes(truth.path) for truth in run.ground_truth.values()]
            alike = known.setdefault(" + ".join(run.ground_truth), [])
            if contents not in alike:
                alike.append(contents)
            number = alike.index(contents) + 1
            dataset = " + ".join(run.ground_truth) + f" ({number})" * (number > 1)
            runs.setdefault(dataset, {}).setdefault(name, []).append(run.path)
    first, *others = sides
    found: dict[str, dict[str, list[Effect]]] = {name: {} for name in others}
    for dataset, by_side in runs.items():
        if first not in by_side or len(by_side) < 2:
            logger.warning(f"{dataset}: only runs of {', '.join(by_side)}; left out")
            continue
        ordered = {name: by_side[name] for name in sides if name in by_side}
        comparison = compare_sides(ordered, resamples=resamples, seed=seed)
        columns = [comparison.metrics.index(metric) for metric in METRICS]
        for name, differences in comparison.differences.items():
            num_runs = min(len(by_side[first]), len(by_side[name]))
            found[name][dataset] = [
                effect_of(dataset, differences[c], num_runs, len(ordered)) for c in columns
            ]
    return _against(first, found)


def effect_of(dataset: str, d: Difference, num_runs: int, num_sides: int) -> Effect:
    """A difference of two of so many sides, each of so many runs, as the effect on a data set."""
    return Effect(dataset, d.value, d.standard_error, d.freedom, num_runs, d.of_images, num_sides)

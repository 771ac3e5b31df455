"""The figures of the alignment report, for one or several detectors laid over each other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.patheffects import withStroke

from ...evaluation.detections import Array
from ...evaluation.metrics import IOU_PERCENT, IOU_THRESHOLDS
from ..plots import new_figure, save_figure, style
from .measures import IOU_BINS

_EDGES = np.linspace(0, 1, IOU_BINS + 1)
_CENTERS = (_EDGES[:-1] + _EDGES[1:]) / 2

_FEW = 10  # detections of a bin: its mean says little
_PALE = f"pale: under {_FEW} detections"

Results = Mapping[str, dict[str, Any]]


def _plot_bins(ax: Any, x: Array, y: Array, count: Array, i: int, label: str) -> None:
    """The curve of the i-th detector over bins; those of few detections are pale."""
    ax.plot(x, y, alpha=0.25, clip_on=False, **style(i))
    ax.plot(x, np.where(count < _FEW, np.nan, y), label=label, clip_on=False, **style(i))


def draw_ap(results: Results, file: Path) -> Path:
    """AP over IoU thresholds, and the two ceilings above it."""
    dashes = {"perfect_ranking": "--", "perfect_placing": ":"}
    figure, ((ax,),) = new_figure(8.0, 4.2)
    for i, (name, result) in enumerate(results.items()):
        values = [result["ap"][f"AP{t}"] for t in IOU_PERCENT]
        ax.plot(IOU_THRESHOLDS, values, label=name, linewidth=2, **style(i))
        for kind, ceiling in result["ceilings"].items():
            values = [ceiling[f"AP{t}"] for t in IOU_PERCENT]
            label = f"{name}, {kind.replace('_', ' ')}"
            ax.plot(IOU_THRESHOLDS, values, dashes[kind], label=label, color=style(i)["color"])
    ax.set(xlabel="IoU threshold", ylabel="AP (%)", ylim=(0, None), xticks=IOU_THRESHOLDS)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return save_figure(figure, file)


def draw_score_by_iou(results: Results, file: Path) -> Path:
    """The paper's Fig. 2: mean score per bin of IoU."""
    figure, ((ax,),) = new_figure(7.0, 4.2)
    for i, (name, result) in enumerate(results.items()):
        bins = result["iou_bins"]
        _plot_bins(ax, _CENTERS, bins["mean_score"], bins["count"], i, name)
    ax.set(xlabel=f"IoU of the box (bins of .05; {_PALE})", ylabel="mean score")
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.legend(frameon=False)
    return save_figure(figure, file)


def draw_share_by_iou(results: Results, file: Path) -> Path:
    """The paper's Fig. 3: share of the detections per bin of IoU; those from .5 on enlarged."""
    figure, axes = new_figure(10, 4.2, columns=2)
    for ax, first in zip(axes[0], (0, IOU_BINS // 2), strict=True):
        for i, (name, result) in enumerate(results.items()):
            share = 100 * result["iou_bins"]["share"][first:]
            ax.stairs(share, _EDGES[first:], color=style(i)["color"], linewidth=2, label=name)
            ax.plot(_CENTERS[first:], share, linestyle="", **style(i))
        xlim = (float(_EDGES[first]), 1)
        ax.set(xlabel="IoU of the box (bins of .05)", xlim=xlim, ylim=(0, None))
    axes[0, 0].set(ylabel="share of all detections (%)", title="all")
    axes[0, 1].set(title="IoU of .5 and more, enlarged")
    axes[0, 1].legend(frameon=False)
    return save_figure(figure, file)


def draw_density(results: Results, file: Path) -> Path:
    """Number of detections by IoU and score, one panel a detector."""
    most = max(max(int(r["density"].max()) for r in results.values()), 2)
    figure, axes = new_figure(0.6 + 4.4 * len(results), 4.2, columns=len(results))
    outline = [withStroke(linewidth=4, foreground="white")]
    for i, (ax, (name, result)) in enumerate(zip(axes[0], results.items(), strict=True)):
        counts = np.where(result["density"] > 0, result["density"], np.nan).T
        mesh = ax.pcolormesh(_EDGES, _EDGES, counts, cmap="cividis", norm=LogNorm(1, most))
        look = {"color": style(i)["color"], "linewidth": 2, "path_effects": outline}
        ax.plot(_CENTERS, result["iou_bins"]["mean_score"], **look)
        ax.set(xlabel="IoU of the box", title=name, xlim=(0, 1), ylim=(0, 1), aspect="equal")
        ax.grid(False)
    axes[0, 0].set_ylabel("score (line: its mean)")
    figure.colorbar(mesh, ax=axes[0, -1], label="detections")
    return save_figure(figure, file)


def draw_calibration(results: Results, file: Path) -> Path:
    """Share of right detections over the score, at some IoU thresholds."""
    thresholds = list(next(iter(results.values()))["calibration"])
    figure, axes = new_figure(11, 4.0, columns=len(thresholds))
    for ax, threshold in zip(axes[0], thresholds, strict=True):
        ax.plot([0, 1], [0, 1], color="#888888", linestyle="--", linewidth=1)
        for i, (name, result) in enumerate(results.items()):
            curve = result["calibration"][threshold]
            label = f"{name} (ECE {curve['ece']:.3f})"
            _plot_bins(ax, curve["mean_score"], curve["share_right"], curve["count"], i, label)
        ax.set(xlabel=f"score ({_PALE})", title=f"right = IoU of {threshold} or more")
        ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        ax.legend(frameon=False, fontsize=8, loc="upper left")
    axes[0, 0].set_ylabel("share of right detections")
    return save_figure(figure, file)

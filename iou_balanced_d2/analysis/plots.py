"""What all figures share: colours, axes and files."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .page import clean

T = TypeVar("T")

# Okabe and Ito's colours, which colour-blind people can tell apart; with markers, as a second sign.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
_LONGEST_LINE = 30  # characters; a legend with longer ones leaves no room for the curves


def style(i: int) -> dict[str, Any]:
    """Colour and marker of the i-th detector, as arguments of ``plot``; 0 is the baseline."""
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}


def label(name: str) -> str:
    """A user's name as text of a figure: in short lines, no formula between dollar signs.

    Matplotlib leaves names that start with an underscore out of legends.
    """
    text = textwrap.fill(clean(name), _LONGEST_LINE).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def labelled(named: Mapping[str, T]) -> dict[str, T]:
    """The same by :func:`label` of each name."""
    return {label(name): value for name, value in named.items()}


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """A figure (inches) without a window, and its axes (rows, columns) with a light grid."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Figure, file: Path) -> Path:
    """Write the figure as PNG to ``file`` and as SVG beside it; returns the PNG."""
    figure.savefig(file, dpi=130)
    figure.savefig(file.with_suffix(".svg"))
    return file

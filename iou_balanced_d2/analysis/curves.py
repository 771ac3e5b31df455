"""The curves of trainings: losses and AP over the iterations."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..files import write_atomically
from .plots import label, new_figure, style
from .training_log import read_training_log

logger = logging.getLogger(__name__)

Curves = dict[str, list[tuple[int, float]]]

_SMOOTH = 20  # points of a loss's curve that are averaged


def read_curves(folder: str | Path) -> Curves:
    """The losses and the APs on the test sets that a training has logged.

    Args:
        folder: its OUTPUT_DIR; may lack ``metrics.json``.

    Returns:
        name -> (iteration, value) by iteration.
    """
    return {k: v for k, v in read_training_log(folder).items() if _is_loss(k) or _is_ap(k)}


def _is_loss(name: str) -> bool:
    return name.removeprefix("validation/").startswith(("loss_", "total_loss"))


def _is_ap(name: str) -> bool:
    return f"/{name}".endswith("/bbox/AP")


def draw_curves(runs: Sequence[tuple[int, str, Curves]]) -> Figure:
    """Draw losses and AP, a panel each.

    Args:
        runs: for each, its detector's row and name ("" for none), and its curves; one at least.

    Returns:
        the figure.
    """
    names = {name: None for _, _, run in runs for name in run}
    ordered = sorted(names, key=_is_ap)
    columns = min(len(ordered), 2)
    rows = -(-len(ordered) // columns)
    figure, panels = new_figure(5.5 * columns, 3.2 * rows, rows, columns)
    for axes, name in zip(panels.flat, ordered, strict=False):
        _draw_panel(axes, name, runs)
    for axes in panels.flat[len(ordered) :]:
        axes.axis("off")
    return figure


def _draw_panel(axes: Any, name: str, runs: Sequence[tuple[int, str, Curves]]) -> None:
    title, named = label(name), set()
    for i, run_name, run in runs:
        if name not in run:
            continue
        x, y = np.array(run[name], float).T
        if _is_loss(name) and len(y) > _SMOOTH:
            x, y = x[_SMOOTH - 1 :], np.convolve(y, np.full(_SMOOTH, 1 / _SMOOTH), "valid")
            title = f"{label(name)} (mean of {_SMOOTH})"
        # One point is no line; many points have no room for markers.
        look = style(i) if len(y) <= 2 * _SMOOTH else style(i) | {"marker": ""}
        axes.plot(x, y, label=None if run_name in named else label(run_name), **look, lw=1)
        named.add(run_name)
    axes.set(title=title, xlabel="iteration", xlim=(0, None))
    if named != {""}:
        axes.legend()


def write_curves(folder: str | Path) -> None:
    """Draw ``curves.png`` of a training into its folder; what goes wrong is logged, never raised.

    Args:
        folder: OUTPUT_DIR.
    """
    file = Path(folder, "curves.png")
    try:
        curves = read_curves(folder)
        if curves:
            figure = draw_curves([(0, "", curves)])
            write_atomically(file, partial(figure.savefig, format="png", dpi=100))
            logger.info(f"Losses and AP of the training: {file}")
    except Exception as error:
        logger.warning(f"{file} is not drawn, which changes nothing else: {error}")

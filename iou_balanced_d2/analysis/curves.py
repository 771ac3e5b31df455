"""What a training has logged: ``metrics.json`` in its folder, read, and drawn as curves."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..files import write_atomically
from .plots import label, new_figure, style

logger = logging.getLogger(__name__)

Curves = dict[str, list[tuple[int, float]]]

_SMOOTH = 20  # points of a loss's curve that are averaged


def read_training_log(folder: str | Path) -> Curves:
    """Read the scalars that detectron2 has logged of a training, one JSON object a line.

    Args:
        folder: its OUTPUT_DIR; may lack the file.

    Returns:
        name -> (iteration, value) by iteration. Of an iteration logged twice, after a resume, the
        later value counts. A line that a killed training left unfinished is skipped.
    """
    file = Path(folder, "metrics.json")
    if not file.is_file():
        return {}
    scalars: dict[str, dict[int, float]] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        entry = _entry(line)
        for name, value in entry.items():
            if name != "iteration" and type(value) in (int, float):
                scalars.setdefault(name, {})[entry["iteration"]] = value
    return {name: sorted(values.items()) for name, values in scalars.items()}


def _entry(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) and type(entry.get("iteration")) is int else {}


def _is_loss(name: str) -> bool:
    return name.removeprefix("validation/").startswith(("loss_", "total_loss"))


def _is_ap(name: str) -> bool:
    return f"/{name}".endswith("/bbox/AP")


def draw_curves(log: Curves) -> Figure | None:
    """Draw the losses and the APs on the test sets, a panel each.

    Args:
        log: of :func:`read_training_log`.

    Returns:
        the figure; None where neither was logged.
    """
    names = [*filter(_is_loss, log), *filter(_is_ap, log)]
    if not names:
        return None
    columns = min(len(names), 2)
    rows = -(-len(names) // columns)
    figure, panels = new_figure(5.5 * columns, 3.2 * rows, rows, columns)
    for axes, name in zip(panels.flat, names, strict=False):
        title, (x, y) = label(name), np.array(log[name], float).T
        if _is_loss(name) and len(y) > _SMOOTH:
            x, y = x[_SMOOTH - 1 :], np.convolve(y, np.full(_SMOOTH, 1 / _SMOOTH), "valid")
            title = f"{title} (mean of {_SMOOTH})"
        # One point is no line; many points have no room for markers.
        look = style(0) if len(y) <= 2 * _SMOOTH else style(0) | {"marker": ""}
        axes.plot(x, y, **look, lw=1)
        axes.set(title=title, xlabel="iteration", xlim=(0, None))
    for axes in panels.flat[len(names) :]:
        axes.axis("off")
    return figure


def write_curves(folder: str | Path) -> None:
    """Draw ``curves.png`` of a training into its folder; what goes wrong is logged, never raised.

    Args:
        folder: OUTPUT_DIR.
    """
    file = Path(folder, "curves.png")
    try:
        figure = draw_curves(read_training_log(folder))
        if figure is not None:
            write_atomically(file, partial(figure.savefig, format="png", dpi=100))
            logger.info(f"Losses and AP of the training: {file}")
    except Exception as error:
        logger.warning(f"{file} is not drawn, which changes nothing else: {error}")

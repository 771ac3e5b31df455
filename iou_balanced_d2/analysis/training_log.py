"""What detectron2 logs of a training: ``metrics.json`` in its folder, one JSON object a line."""

import json
from pathlib import Path
from typing import Any


def read_training_log(folder: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Read the scalars of a training.

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

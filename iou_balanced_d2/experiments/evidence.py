"""The record of a finished run: one small JSON file, without detections, weights or paths.

::

    {"dataset": "pcb", "variant": "both", "seed": 3,
     "metrics": {"AP": 31.2, "AP50": 60.1, ..., "AP95": 0.4, "APs": ..., "APm": ..., "APl": ...},
     "classes": {"open": 28.1, ...},           # AP of each class; null where there is no object
     "measured": {"iou_balanced/w_loc": 2.1, "score_iou_correlation": 0.4, ...},
     "iterations": 450, "seconds": 431.5,
     "settings": {"SOLVER.BASE_LR": 0.01, ...},   # what the protocol says of the run
     "config": "<SHA-256>", "versions": {...}, "hardware": {...}}
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..analysis.comparison.compare import run_metrics
from ..engine.config import flatten
from ..errors import UserError
from ..files import write_text
from .results import measures
from .runs import Run

# What differs between machines, or between the runs of a variant.
_NOT_OF_THE_SETTING = {
    "OUTPUT_DIR", "SEED", "MODEL.DEVICE", "MODEL.WEIGHTS",
    "DATASETS.COCO_JSON", "DATASETS.VOC_FOLDER", "DATASETS.YOLO_FOLDER",
}  # fmt: skip


def record_of(folder: str | Path) -> dict[str, Any]:
    """The record of a run of an experiment.

    Args:
        folder: of a complete run, with ``run.json``, ``config.yaml``, ``metrics.json`` and the
            detections on DATASETS.TEST, which AP is computed from (all sets pooled).

    Returns:
        see the module's docstring.

    Raises:
        UserError: if the run is not complete, or a file is missing or broken.
    """
    folder = Path(folder)
    run = Run(name="", folder=folder, config=folder, settings={})
    record = run.record
    names = str(record.get("name", "")).split("/")
    if not run.complete or len(names) != 3:
        raise UserError(f"{folder / 'run.json'}: not of a complete run <data set>/<variant>/<seed>")
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    metrics = {
        name: None if math.isnan(value) else round(value, 4)
        for name, value in run_metrics(folder).items()
    }
    return {
        "dataset": names[0],
        "variant": names[1],
        "seed": config.get("SEED", record["settings"].get("SEED")),
        "metrics": {k: v for k, v in metrics.items() if not k.startswith("AP-")},
        "classes": {k[3:]: v for k, v in metrics.items() if k.startswith("AP-")},
        "measured": measures(run),
        "iterations": config.get("SOLVER", {}).get("MAX_ITER"),
        "seconds": round(record["seconds"], 1),
        "settings": _setting(record["settings"]),
        "config": digest(config),
        "versions": record.get("versions", {}),
        "hardware": record.get("hardware", {}),
    }


def digest(config: dict[str, Any]) -> str:
    """SHA-256 of a setting: of its config without seed, and without paths of the machine."""
    text = json.dumps(_setting(flatten(config)), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _setting(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key not in _NOT_OF_THE_SETTING}


def record_file(evidence: str | Path, name: str) -> Path:
    """``<evidence>/<data set>-<variant>-seed<n>.json``, of the run "data set/variant/seed<n>"."""
    return Path(evidence, name.replace("/", "-").replace(" ", "_") + ".json")


def read_record(file: Path, run: Run) -> dict[str, Any]:
    """The record of a run of the protocol.

    Raises:
        UserError: if the file is broken, or of a run with other settings.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        settings = record["settings"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: not the record of a run: {error!r}") from error
    if settings != json.loads(json.dumps(_setting(run.settings))):
        raise UserError(
            f"{file} is of a run with other settings than the protocol's; delete it, or give other "
            "--records"
        )
    return record


def write_record(folder: str | Path, evidence: str | Path) -> Path:
    """Write the record of a run to its :func:`record_file`; its detections are not needed then.

    Args:
        folder: see :func:`record_of`.
        evidence: the folder of records, made if absent.

    Returns:
        the file.

    Raises:
        UserError: as of :func:`record_of`, or if it can't be written.
    """
    record = record_of(folder)
    file = record_file(evidence, f"{record['dataset']}/{record['variant']}/seed{record['seed']}")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(record, indent=1, allow_nan=False) + "\n")
    return file

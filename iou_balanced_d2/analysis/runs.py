"""The runs of a comparison: where their detections, ground truth and curves are."""

import glob
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..config import add_iou_balanced_config
from ..data import check_difficult_policy, prepare_dataset, register_datasets_of
from ..data.demo import ensure_demo_datasets
from ..errors import UserError

RESULTS = "coco_instances_results.json"
_LOSSES = ("total_loss", "loss_cls", "loss_box_reg")


@dataclass(frozen=True)
class Annotations:
    """Ground truth of one data set.

    Attributes:
        path: a JSON file in COCO's instance format.
        difficult: the policy for difficult objects, see :func:`prepare_ground_truth`.
    """

    path: str
    difficult: str = "ignore"


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        path: its directory, or its file of detections.
        detections: data set -> file of detections.
        ground_truth: data set -> ground truth.
    """

    path: str
    detections: dict[str, str]
    ground_truth: dict[str, Annotations]


@dataclass(frozen=True)
class Side:
    """Runs of the same setting.

    Attributes:
        name: what reports call it.
        runs: at least one.
    """

    name: str
    runs: tuple[Run, ...]


def load_side(
    name: str, runs: Sequence[str | Path], ground_truth: Mapping[str, str] | None = None
) -> Side:
    """Find what belongs to the runs of a side; no detections are read yet.

    Args:
        name: what reports call it.
        runs: OUTPUT_DIRs of ``train_net.py``, or files of detections in COCO's format.
        ground_truth: data set -> JSON file. The data sets compared are these then; without, they
            are DATASETS.TEST of the run's ``config.yaml``, read as that config says.

    Returns:
        the side.

    Raises:
        UserError: if a file is missing, or it is not clear what data set a file is of.
    """
    if not runs:
        raise UserError(f"side {name!r} has no run")
    return Side(name, tuple(_load_run(str(path), dict(ground_truth or {})) for path in runs))


def _load_run(path: str, given: dict[str, str]) -> Run:
    if os.path.isfile(path):
        if len(given) != 1:
            raise UserError(
                f"{path}: a file of detections needs one --ground-truth NAME=FILE, "
                f"got {len(given) or 'none'}"
            )
        (name,) = given
        return Run(path, {name: path}, {name: Annotations(given[name])})
    if not os.path.isdir(path):
        raise UserError(f"run {path!r} not found")
    ground_truth = _ground_truth_of(path, given)
    detections = {name: _detections_of(path, name, len(ground_truth)) for name in ground_truth}
    return Run(path, detections, ground_truth)


def _detections_of(path: str, name: str, num_datasets: int) -> str:
    """The file of detections; detectron2's own scripts leave out the data set's name."""
    file = os.path.join(path, "inference", name, RESULTS)
    plain = os.path.join(path, "inference", RESULTS)
    if num_datasets == 1 and not os.path.isfile(file) and os.path.isfile(plain):
        return plain
    if not os.path.isfile(file):
        raise UserError(
            f"{file} not found: evaluate the run first (train_net.py --eval-only --config-file "
            f"{os.path.join(path, 'config.yaml')} OUTPUT_DIR {path} MODEL.WEIGHTS ...)"
        )
    return file


def _ground_truth_of(path: str, given: dict[str, str]) -> dict[str, Annotations]:
    """Data set -> ground truth of a run directory."""
    file = os.path.join(path, "config.yaml")
    if not os.path.isfile(file):
        if not given:
            raise UserError(f"{file} not found: name the data sets by --ground-truth NAME=FILE")
        return {name: Annotations(json_file) for name, json_file in given.items()}
    cfg = _read_datasets(file)
    policy = cfg.DATASETS.VOC_DIFFICULT
    if given:
        return {name: Annotations(json_file, policy) for name, json_file in given.items()}
    try:
        register_datasets_of(cfg)
        return {name: Annotations(_json_file(name), policy) for name in cfg.DATASETS.TEST}
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _read_datasets(file: str) -> CfgNode:
    """The config with its section DATASETS; the model may be one that this package lacks."""
    cfg = get_cfg()
    add_iou_balanced_config(cfg)
    try:
        with open(file, encoding="utf-8") as f:
            content = yaml.safe_load(f)
        cfg.DATASETS.merge_from_other_cfg(CfgNode(content["DATASETS"]))
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: not a run's config: {reason}") from error
    if not cfg.DATASETS.TEST:
        raise UserError(f"{file}: DATASETS.TEST is empty; give --ground-truth NAME=FILE")
    check_difficult_policy(cfg.DATASETS.VOC_DIFFICULT)
    return cfg


def _json_file(name: str) -> str:
    """The annotations of a registered data set, converted or drawn if need be."""
    if name not in DatasetCatalog:
        raise UserError(f"data set {name!r} is not registered: give --ground-truth {name}=FILE")
    prepare_dataset(name)
    json_file = MetadataCatalog.get(name).get("json_file")
    if not json_file:
        raise UserError(f"data set {name!r} has no JSON file: give --ground-truth {name}=FILE")
    if name.startswith("iou_balanced_demo_"):
        ensure_demo_datasets(str(Path(json_file).parents[2]))
    return str(json_file)


def parse_side(text: str) -> tuple[str, list[str]]:
    """A side as the command line has it.

    Args:
        text: runs joined by commas, each a path or a pattern with ``*``, after ``NAME=`` if the
            side is to have a name of its own.

    Returns:
        name and paths; without a name it is that of the first run, without a number at its end
        where there are several.

    Raises:
        UserError: if nothing fits.
    """
    name, sign, rest = text.partition("=")
    if not sign or os.path.exists(text):
        name, rest = "", text
    paths: list[str] = []
    for part in filter(None, rest.split(",")):
        found = sorted(glob.glob(part)) if glob.has_magic(part) else [part]
        if not found:
            raise UserError(f"no run fits {part!r}")
        paths += [os.path.normpath(path) for path in found]
    if not paths:
        raise UserError(f"side {text!r} has no run")
    if not name:
        name = Path(paths[0]).stem if os.path.isfile(paths[0]) else Path(paths[0]).name
        if len(paths) > 1:
            name = re.sub(r"[-_.]?(seed|run)?[-_.]?\d+$", "", name) or name
    return name, paths


def read_curves(run: Run) -> dict[str, list[tuple[int, float]]]:
    """What ``metrics.json`` tells of a training.

    Args:
        run: its directory may lack the file.

    Returns:
        name -> (iteration, value) by iteration, of the losses and of AP on the test sets; of an
        iteration run twice, after a resume, the later one.
    """
    file = Path(run.path, "metrics.json")
    if not file.is_file():
        return {}
    curves: dict[str, dict[int, float]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        scalars = _scalars(line)
        for key, value in scalars.items():
            if key in _LOSSES or key == "bbox/AP" or key.endswith("/bbox/AP"):
                curves.setdefault(key, {})[scalars["iteration"]] = value
    return {key: sorted(points.items()) for key, points in curves.items()}


def _scalars(line: str) -> dict[str, Any]:
    """One line of metrics.json; {} for one that a killed training left unfinished."""
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) and "iteration" in content else {}

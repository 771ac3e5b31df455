"""The runs of a comparison: where their detections and ground truth are."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from ...config import add_iou_balanced_config
from ...data import check_difficult_policy, prepare_dataset, register_datasets_of
from ...data.demo import ensure_demo_datasets
from ...errors import UserError

RESULTS = "coco_instances_results.json"


@dataclass(frozen=True)
class Annotations:
    """Ground truth of one data set."""

    path: str  # a JSON file in COCO's instance format
    difficult: str = "ignore"  # the policy for difficult objects, DATASETS.VOC_DIFFICULT


@dataclass(frozen=True)
class Run:
    """One training run."""

    path: str  # its directory, or its file of detections
    detections: dict[str, str]  # data set -> file of detections
    ground_truth: dict[str, Annotations]  # data set -> ground truth


def load_run(path: str | Path, ground_truth: Mapping[str, str] | None = None) -> Run:
    """Find what belongs to a run, its OUTPUT_DIR or a file of detections; they are not read yet.

    The data sets are those of ``ground_truth``, name -> JSON file; without, they are DATASETS.TEST
    of the run's ``config.yaml``, read as that config says.
    """
    path, given = str(path), dict(ground_truth or {})
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
    truths = _ground_truth_of(path, given)
    return Run(path, {name: _detections_of(path, name, len(truths)) for name in truths}, truths)


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
    own = (*cfg.DATASETS.COCO_JSON, *cfg.DATASETS.VOC_FOLDER, *cfg.DATASETS.YOLO_FOLDER)
    try:
        # Another run may have another data set, or another path, of this name.
        for name in {e[0] for e in own if isinstance(e, list | tuple) and len(e) > 2}:
            DatasetCatalog.pop(name, None)
        register_datasets_of(cfg)
        return {name: Annotations(json_file_of(name), policy) for name in cfg.DATASETS.TEST}
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


def json_file_of(name: str) -> str:
    """The annotations of a registered data set, converted or drawn if need be."""
    if name not in DatasetCatalog:
        raise UserError(f"data set {name!r} is not registered: name one by --ground-truth")
    prepare_dataset(name)
    json_file = MetadataCatalog.get(name).get("json_file")
    if not json_file:
        raise UserError(f"data set {name!r} has no JSON file: name one by --ground-truth")
    if name.startswith("iou_balanced_demo_"):
        ensure_demo_datasets(str(Path(json_file).parents[2]))
    return str(json_file)

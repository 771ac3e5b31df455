"""Check the data sets of a config before hours are spent on them. Nothing is changed.

python tools/check_dataset.py --config-file configs/Demo/retinanet_demo_iou_balanced.yaml
"""

import argparse
import contextlib
import os
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.utils.visualizer import Visualizer
from tabulate import tabulate

from ..analysis.page import clean
from ..config import loss_options
from ..data import check_datasets
from ..data.anchors import (
    anchor_advice,
    anchor_recall,
    expected_w_loc,
    mean_recall,
    recall_in_words,
)
from ..data.checks import LOW_RECALL
from ..data.coco_format import REPAIRS
from ..data.inspection import FATAL, PROBLEMS, Report, inspect
from ..engine import load_config
from ..files import make_folder
from ..modeling.w_loc import MIN_BALANCED_SHARE


def check(
    cfg: CfgNode, args: argparse.Namespace, found: set[str], name: str, content: dict[str, Any]
) -> None:
    """Check one data set, print what was found, and add the kinds of its problems."""
    metadata = MetadataCatalog.get(name)
    report = inspect(cfg, content, metadata.image_root, read_images=not args.quick)
    print(f"\n{name}: {report.num_images} images, {report.num_annotations} annotations, ", end="")
    print(f"{report.num_empty} images without any")
    counts = [(clean(name), number) for name, number in report.classes.items()]
    print(tabulate(counts, headers=("class", "annotations"), tablefmt="github"))
    print_findings(report, args.most)
    if "RetinaNet" in cfg.MODEL.META_ARCHITECTURE and report.num_annotations:
        print_anchors(cfg, content)
    if args.pictures:
        draw(name, args.pictures, args.most)
    found.update(report.problems)


def print_findings(report: Report, most: int) -> None:
    for kind, (number, place) in report.repairs.items():
        print(f"repaired: {number} x {kind}, as at {place} ({REPAIRS[kind]})")
    if report.rotated:
        print(f"{report.rotated} photos are turned by their EXIF data; boxes are in the turned one")
    for kind, places in report.problems.items():
        print(f"{kind}: {len(places)} ({PROBLEMS[kind]})")
        for place in places[:most]:
            print(f"    {place}")
        if len(places) > most:
            print(f"    ... and {len(places) - most} more")
    if not report.problems:
        print("no problems")


def print_anchors(cfg: CfgNode, content: dict[str, Any]) -> None:
    threshold = cfg.MODEL.RETINANET.IOU_THRESHOLDS[-1]
    recalls = anchor_recall(cfg, content)
    print(
        f"anchor recall: {clean(recall_in_words(recalls))} meet an anchor at IoU {threshold}",
        end="",
    )
    too_few = mean_recall(recalls) < LOW_RECALL
    print(f": too few; {anchor_advice(cfg, content)}" if too_few else "")
    options = loss_options(cfg)
    if options.loc_lambda and not options.loc_weight and options.loc_weight_rule == "anchors":
        w_loc = expected_w_loc(cfg, content)
        verdict = "the paper's: 2.34 and 3.05"
        if w_loc * MIN_BALANCED_SHARE > 1:
            verdict = (
                "too large, so the box loss would stay plain: set MODEL.IOU_BALANCED.LOC_WEIGHT"
            )
        print(f"w_loc to expect: {w_loc:.2f} ({verdict})")


def draw(name: str, folder: str, most: int) -> None:
    """Boxes on the images with most of them; each picture is named after its image's id."""
    metadata = MetadataCatalog.get(name)
    records = sorted(DatasetCatalog.get(name), key=lambda d: -len(d["annotations"]))[:most]
    make_folder(folder)
    for record in records:
        with contextlib.suppress(Exception):  # it has been named above
            image = read_image(record["file_name"], "RGB")
            drawn = Visualizer(image, metadata).draw_dataset_dict(record)
            drawn.save(os.path.join(folder, f"{name}_{record['image_id']}.jpg"))
    print(f"pictures with boxes: {folder}")


def run(args: argparse.Namespace) -> int:
    """Check each data set; 1 if something would spoil a training, with --strict for any problem."""
    cfg = load_config(args.config_file, args.opts)
    kinds: set[str] = set()
    check_datasets(cfg, training=True, look=partial(check, cfg, args, kinds))
    return 1 if kinds & FATAL or (kinds and args.strict) else 0

#!/usr/bin/env python
"""Check the data sets of a config before hours are spent on them. Nothing is changed.

python tools/check_dataset.py --config-file configs/Demo/retinanet_demo_iou_balanced.yaml
"""

import argparse
import sys

from iou_balanced_d2.data import check_datasets
from iou_balanced_d2.data.coco_format import read_coco_json
from iou_balanced_d2.data.inspection import (
    PROBLEMS,
    Report,
    anchor_recall,
    inspect_annotations,
    inspect_images,
)
from iou_balanced_d2.engine import load_config
from iou_balanced_d2.errors import UserError

# isort: split
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from tabulate import tabulate


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", required=True, help="config file of the run")
    parser.add_argument("--quick", action="store_true", help="do not read the images")
    parser.add_argument("--strict", action="store_true", help="any problem is an error (exit 1)")
    parser.add_argument("--most", type=int, default=10, help="problems named of each kind")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the run")
    return parser.parse_args()


def check(cfg: CfgNode, name: str, args: argparse.Namespace) -> int:
    """Check one data set and print what was found; returns the number of problems."""
    metadata = MetadataCatalog.get(name)
    content = read_coco_json(metadata.json_file)
    report = inspect_annotations(content)
    if not args.quick:
        for kind, places in inspect_images(content, metadata.image_root).problems.items():
            report.add((kind, place) for place in places)
    print(f"\n{name}: {report.num_images} images, {report.num_annotations} annotations, ", end="")
    print(f"{report.num_empty} images without any")
    print(tabulate(report.classes.items(), headers=("class", "annotations"), tablefmt="github"))
    print_problems(report, args.most)
    if "RetinaNet" in cfg.MODEL.META_ARCHITECTURE:
        threshold = cfg.MODEL.RETINANET.IOU_THRESHOLDS[-1]
        share = anchor_recall(cfg, content)
        print(f"anchor recall: {share:.1%} of the boxes meet an anchor at IoU {threshold}")
    return report.num_problems


def print_problems(report: Report, most: int) -> None:
    for kind, places in report.problems.items():
        print(f"{kind}: {len(places)} ({PROBLEMS[kind]})")
        for place in places[:most]:
            print(f"    {place}")
        if len(places) > most:
            print(f"    ... and {len(places) - most} more")
    if not report.problems:
        print("no problems")


def main() -> int:
    args = parse_arguments()
    try:
        cfg = load_config(args.config_file, args.opts)
        check_datasets(cfg, training=True, inspect=False)  # all problems are listed here
        names = dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
        found = sum([check(cfg, name, args) for name in names])
    except UserError as error:
        print(f"check_dataset.py: error: {error}", file=sys.stderr)
        return 2
    return 1 if found and args.strict else 0


if __name__ == "__main__":
    sys.exit(main())

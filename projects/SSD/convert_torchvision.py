#!/usr/bin/env python
"""Write torchvision's SSD300-VGG16 or VGG16 weights as a checkpoint of this project.

Loading by MODEL.WEIGHTS does the same; this script also chooses classes. torchvision's COCO
model has 90 classes, ten of which COCO does not use: --coco keeps COCO's 80.

python projects/SSD/convert_torchvision.py ssd300_vgg16_coco-b556d3b4.pth ssd300_coco.pth --coco
"""

import argparse
import os
import sys
from collections.abc import Sequence

from iou_balanced_d2.errors import UserError
from iou_balanced_d2.projects.ssd.convert import convert_ssd300, convert_vgg16

# isort: split
import torch
from detectron2.data import MetadataCatalog

NUM_TORCHVISION_CLASSES = 90


def coco_classes() -> list[int]:
    """Torchvision's numbers of COCO's 80 classes: the ids in COCO's own files."""
    return list(MetadataCatalog.get("coco_2017_val").thing_dataset_id_to_contiguous_id)


def convert(source: str, target: str, classes: Sequence[int] | None) -> None:
    """Convert a file.

    Args:
        source: state dict of torchvision.
        target: file to write.
        classes: see :func:`convert_ssd300`.

    Raises:
        UserError: if the source is not such a file, or the target can't be written.
    """
    if not os.path.isfile(source):
        raise UserError(f"{source!r} not found")
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{source!r} can't be read as a PyTorch file") from error
    if "features.0.weight" in state:
        converted = convert_vgg16(state)
    elif "head.classification_head.module_list.0.weight" in state:
        num_scores = state["head.classification_head.module_list.0.bias"].numel() // 4
        if classes is not None and num_scores != NUM_TORCHVISION_CLASSES + 1:
            raise UserError(
                f"{source!r} has {num_scores - 1} classes: --coco is for torchvision's COCO model, "
                f"which has {NUM_TORCHVISION_CLASSES}"
            )
        converted = convert_ssd300(state, classes)
    else:
        raise UserError(f"{source!r} is neither torchvision's ssd300_vgg16 nor its vgg16")
    try:
        with open(target, "wb") as file:
            torch.save({"model": converted}, file)
    except OSError as error:
        raise UserError(f"{target!r} can't be written: {error.strerror}") from error
    print(f"{len(converted)} tensors written to {target}; use them by MODEL.WEIGHTS {target}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="torchvision's file")
    parser.add_argument("target", help="file to write, .pth")
    parser.add_argument("--coco", action="store_true", help="keep COCO's 80 of the 90 classes")
    args = parser.parse_args()
    try:
        convert(args.source, args.target, coco_classes() if args.coco else None)
    except UserError as error:
        print(f"convert_torchvision.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

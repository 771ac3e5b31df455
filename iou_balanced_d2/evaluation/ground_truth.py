"""Ground truth of COCO form as the implementations of COCOeval need it."""

import contextlib
import io
from typing import Any

from pycocotools.coco import COCO

from ..data.voc import check_difficult_policy


def prepare_ground_truth(coco: COCO, difficult: str) -> None:
    """Make the annotations fit for evaluation, in memory.

    Afterwards each annotation with "difficult" set is one to be ignored, whatever the file says.

    Args:
        coco: the ground truth; changed in place.
        difficult: "ignore" (neither right nor wrong nor missed), "count" (as any object) or "drop"
            (as if it was not annotated).

    Raises:
        UserError: if the policy is not known.
    """
    check_difficult_policy(difficult)
    coco.dataset.setdefault("info", {})  # pycocotools 2.0.9 and 2.0.10 read it
    annotations = coco.dataset["annotations"]
    if difficult == "drop":
        annotations = [a for a in annotations if not a.get("difficult")]
    for annotation in annotations:
        _complete(annotation)
        # A crowd is ignored already, by a rule of its own.
        if difficult == "count" or annotation["iscrowd"]:
            annotation.pop("difficult", None)
    _renumber(annotations)
    coco.dataset["annotations"] = annotations
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()


def _complete(annotation: dict[str, Any]) -> None:
    """Fields that detectron2 trains without, but COCOeval reads."""
    annotation.setdefault("iscrowd", 0)
    annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])


def _renumber(annotations: list[dict[str, Any]]) -> None:
    """Number the annotations from 1, if their ids are not unique or one is 0.

    COCOeval writes a detection's match down as the object's id, with 0 for none: a hit on the
    object 0 would be a miss.
    """
    ids = {a["id"] for a in annotations}
    if 0 in ids or len(ids) < len(annotations):
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number

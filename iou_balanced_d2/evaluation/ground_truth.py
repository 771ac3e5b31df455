"""Ground truth of COCO form as the implementations of COCOeval need it."""

import contextlib
import io

from pycocotools.coco import COCO

from ..data.coco_format import area_of
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
    for number, annotation in enumerate(annotations, start=1):
        # COCOeval writes a detection's match down as the object's id, with 0 for none.
        annotation["id"] = number
        # Fields that detectron2 trains without, but COCOeval reads.
        annotation.setdefault("iscrowd", 0)
        annotation["area"] = area_of(annotation)
        # A crowd is ignored already, by a rule of its own.
        if difficult == "count" or annotation["iscrowd"]:
            annotation.pop("difficult", None)
    coco.dataset["annotations"] = annotations
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()

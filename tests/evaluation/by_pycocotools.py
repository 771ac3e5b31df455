"""AP and recall by pycocotools' COCOeval, what the project's own are compared with."""

import contextlib
import copy
import io
from collections import defaultdict

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from iou_balanced_d2.data.coco_format import area_of
from iou_balanced_d2.evaluation import coco_metrics


def prepare_ground_truth(coco, difficult):
    """Make the annotations of a COCO fit for COCOeval and the policy, in memory."""
    coco.dataset.setdefault("info", {})  # pycocotools 2.0.9 and 2.0.10 read it
    annotations = coco.dataset["annotations"]
    if difficult == "drop":
        annotations = [a for a in annotations if not a.get("difficult")]
    for number, annotation in enumerate(annotations, start=1):
        # COCOeval writes a detection's match down as the object's id, with 0 for none.
        annotation["id"] = number
        annotation.setdefault("iscrowd", 0)
        annotation["area"] = area_of(annotation)
        # A crowd is ignored already, by a rule of its own.
        if difficult == "count" or annotation["iscrowd"]:
            annotation.pop("difficult", None)
    coco.dataset["annotations"] = annotations
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()


class IgnoringDifficult(COCOeval):
    """COCOeval that ignores difficult objects as VOC does.

    It knows two kinds of ignored objects: out of the range of area, with plain IoU but for one
    detection only, and crowds, for any number of detections but with the intersection over the
    *detection's* area for IoU. A difficult object is no crowd while IoUs are computed, and one when
    detections are matched. COCOeval first computes the IoUs, then matches.
    """

    def _prepare(self):
        self._difficult = defaultdict(list)
        for gt in self.cocoGt.anns.values():
            if gt.get("difficult"):
                gt["iscrowd"] = 0
                self._difficult[gt["image_id"], gt["category_id"]].append(gt)
        super()._prepare()  # overwrites "ignore" with "iscrowd"
        for gts in self._difficult.values():
            for gt in gts:
                gt["ignore"] = 1

    def computeIoU(self, imgId, catId):
        ious = super().computeIoU(imgId, catId)
        for gt in self._difficult.get((imgId, catId), ()):
            gt["iscrowd"] = 1
        return ious


def arrays_by_pycocotools(coco, rows, max_dets=(1, 10, 100)):
    """What evaluate_boxes returns, of a COCO from :func:`prepare_ground_truth`."""
    coco, rows = copy.deepcopy((coco, rows))
    with contextlib.redirect_stdout(io.StringIO()):
        if rows:
            results = coco.loadRes(rows)
        else:  # loadRes fails when there are none
            results = COCO()
            results.dataset = {**coco.dataset, "annotations": []}
            results.createIndex()
        oracle = IgnoringDifficult(coco, results, "bbox")
        oracle.params.maxDets = list(max_dets)
        oracle.evaluate()
        oracle.accumulate()
    precision, recall = oracle.eval["precision"], oracle.eval["recall"]
    ap = precision[..., -1].mean(axis=1)
    return {"ap": np.where(ap < 0, np.nan, ap), "recall": np.where(recall < 0, np.nan, recall)}


def metrics_by_pycocotools(coco, rows):
    """The metrics by their names."""
    names = [coco.cats[i]["name"] for i in sorted(coco.cats)]
    return coco_metrics(**arrays_by_pycocotools(coco, rows), class_names=names)

"""COCO's matching and accumulation of boxes, by whichever implementation is there.

Letters: T IoU thresholds, R recall thresholds, K classes, A ranges of area, M limits of detections.
"""

import contextlib
import importlib
import io
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray
from pycocotools.coco import COCO

from ..data.coco_format import area_of
from ..data.voc import check_difficult_policy

# By preference, detectron2's own first: name -> where its class is. How long each takes is measured
# by tools/benchmark_evaluation.py.
IMPLEMENTATIONS = {
    "detectron2": ("detectron2.evaluation.fast_eval_api", "COCOeval_opt"),
    "faster-coco-eval": ("faster_coco_eval", "COCOeval_faster"),
    "pycocotools": ("pycocotools.cocoeval", "COCOeval"),
}


def available_implementations() -> dict[str, type]:
    """The implementations that can be imported here, the preferred one first; never empty.

    Returns:
        name -> class with the interface of pycocotools' COCOeval. "detectron2" is its C++, which
        must be compiled; "faster-coco-eval" is a package (the extra "fast").
    """
    found = {}
    for name, (module, attribute) in IMPLEMENTATIONS.items():
        with contextlib.suppress(ImportError):
            found[name] = getattr(importlib.import_module(module), attribute)
    return found


def choose_implementation(coco: COCO) -> str:
    """Name of the preferred implementation that can evaluate this ground truth."""
    names = list(available_implementations())
    if not all(isinstance(i, int) for i in coco.imgs):
        # faster-coco-eval looks images up by number.
        names = [name for name in names if name != "faster-coco-eval"]
    return names[0]


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


def evaluate_boxes(
    coco: COCO,
    results: list[dict[str, Any]],
    *,
    implementation: str | None = None,
    max_dets: Sequence[int] = (1, 10, 100),
    img_ids: Sequence[Any] | None = None,
) -> dict[str, NDArray[Any]]:
    """Match detections with objects and accumulate precision over recall, once for all metrics.

    Annotations with "difficult" set are ignored: by plain IoU, and for any number of detections.

    Args:
        coco: ground truth, from :func:`prepare_ground_truth`.
        results: detections in COCO's format: "image_id", "category_id", "bbox" (XYWH), "score". May
            be empty. Fields are added to them.
        implementation: a name of :func:`available_implementations`; None for
            :func:`choose_implementation`'s.
        max_dets: limits of detections an image and class, rising.
        img_ids: the images to evaluate; None for all.

    Returns:
        "precision" (T, R, K, A, M), with -1 for classes without objects; "recall" (T, K, A, M),
        likewise; float64. Thresholds are .50 to .95; classes in the order of their category ids;
        areas all, small, medium, large.

    Raises:
        KeyError: if the implementation is not available.
    """
    name = implementation or choose_implementation(coco)
    evaluation_class = ignoring_difficult(available_implementations()[name])
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = evaluation_class(coco, _load_results(coco, results), "bbox")
        evaluation.params.maxDets = list(max_dets)
        if img_ids is not None:
            evaluation.params.imgIds = list(img_ids)
        evaluation.evaluate()
        evaluation.accumulate()
    return {key: evaluation.eval[key] for key in ("precision", "recall")}


def _load_results(coco: COCO, results: list[dict[str, Any]]) -> COCO:
    """Detections as COCOeval takes them; pycocotools' loadRes fails when there are none."""
    if results:
        return coco.loadRes(results)
    empty = COCO()
    empty.dataset = {**coco.dataset, "annotations": []}
    empty.createIndex()
    return empty


def ignoring_difficult(base: Any) -> Any:
    """A subclass of an implementation of COCOeval that ignores difficult objects as VOC does.

    COCOeval knows two kinds of ignored objects: out of the range of area, with plain IoU but for
    one detection only, and crowds, for any number of detections but with the intersection over the
    *detection's* area for IoU. A difficult object is no crowd while IoUs are computed, and one when
    detections are matched. All implementations first compute the IoUs, then match.

    Args:
        base: an implementation of COCOeval.

    Returns:
        the subclass. It leaves difficult annotations marked as crowds.
    """

    class Evaluation(base):
        def _prepare(self) -> None:
            self._difficult: dict[Any, list[dict[str, Any]]] = defaultdict(list)
            for gt in self.cocoGt.anns.values():
                if gt.get("difficult"):
                    gt["iscrowd"] = 0
                    self._difficult[gt["image_id"], gt["category_id"]].append(gt)
            super()._prepare()  # overwrites "ignore" with "iscrowd"
            for gts in self._difficult.values():
                for gt in gts:
                    gt["ignore"] = 1

        def computeIoU(self, imgId: Any, catId: Any) -> Any:
            ious = super().computeIoU(imgId, catId)
            for gt in self._difficult.get((imgId, catId), ()):
                gt["iscrowd"] = 1
            return ious

    return Evaluation

"""One evaluator of boxes for all data sets."""

import logging
import os
from collections.abc import Iterable
from json import JSONEncoder
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from ..errors import UserError
from ..files import write_atomically
from .detections import make_detections, read_ground_truth
from .matching import evaluate_boxes, num_objects
from .metrics import (
    IOU_PERCENT,
    class_table,
    coco_metrics,
    recall_table,
    threshold_table,
    voc_table,
)
from .voc import VocAP, voc_average_precision, voc_metrics


def metric_names(dataset_name: str) -> list[str]:
    """The names of what :class:`BoxEvaluator` computes, such as "bbox/AP75".

    Args:
        dataset_name: a registered data set, whose classes are known.
    """
    metadata = MetadataCatalog.get(dataset_name)
    classes, thresholds = metadata.get("thing_classes", []), len(IOU_PERCENT)
    undefined = np.full((thresholds, len(classes), 4, 3), np.nan)
    names = [f"bbox/{name}" for name in coco_metrics(undefined[..., 0], undefined, classes)]
    if metadata.get("voc_style"):
        nothing = undefined[..., 0, 0]
        names += [f"voc/{name}" for name in voc_metrics(VocAP(nothing, nothing), classes)]
    return names


class BoxEvaluator(COCOEvaluator):
    """AP50 to AP95 of boxes, on every data set detectron2 can express in COCO's format.

    Where the metadata has ``voc_style=True`` VOC's own metric stands beside it.
    """

    _metadata: Metadata

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        *,
        difficult: str = "ignore",
        max_dets_per_image: int | None = None,
    ):
        """Read the ground truth.

        Args:
            dataset_name: a registered data set.
            output_dir: folder for ``coco_instances_results.json``; needed for data sets whose
                metadata has no ``json_file``, as they are converted.
            difficult: what becomes of objects with "difficult" set, see
                :func:`~iou_balanced_d2.evaluation.detections.read_ground_truth`.
            max_dets_per_image: limit of detections an image; None is COCO's 100.

        Raises:
            UserError: if the data set's file is broken, or the policy for difficult objects is not
                known.
        """
        super().__init__(
            dataset_name,
            tasks=("bbox",),
            output_dir=output_dir,
            max_dets_per_image=max_dets_per_image,
            use_fast_impl=False,  # neither of detectron2's two is used
            allow_cached_coco=False,  # the data set may have changed since
        )
        self._logger = logging.getLogger(__name__)
        if self._do_evaluation:
            json_file = PathManager.get_local_path(self._metadata.json_file)
            self._ground_truth = read_ground_truth(json_file, difficult)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Gather the detections, write them and compute the metrics.

        Returns:
            "bbox" -> metrics of :func:`coco_metrics`, and "voc" -> those of :func:`voc_metrics`
            for VOC's data sets; on the main process, {} on others and without annotations.
        """
        if not self._predictions and comm.is_main_process():
            # Nothing found in no image is a result, too: detectron2 would return {}.
            self._predictions.append({"image_id": None, "instances": []})
        results: dict[str, dict[str, float]] = super().evaluate()
        return results

    def _eval_predictions(self, predictions: Iterable[dict[str, Any]], img_ids: None) -> None:
        """Fill the results; called by :meth:`evaluate` on the main process."""
        rows = [d for prediction in predictions for d in prediction["instances"]]
        self._use_dataset_ids(rows)
        if self._output_dir:
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            pieces = map(str.encode, JSONEncoder().iterencode(rows))  # not one text of gigabytes
            write_atomically(path, lambda f: f.writelines(pieces))
            self._logger.info(f"{len(rows)} detections written to {path}")
        if not self._do_evaluation:
            self._logger.info("Not evaluated: the data set has no annotations")
            return
        truth, limits = self._ground_truth, self._max_dets_per_image
        self._logger.info(f"Evaluating {len(rows)} boxes ...")
        found = make_detections(rows, truth, "detections", limit=limits[-1])
        counts = evaluate_boxes(truth, found, limits)
        metrics = coco_metrics(**counts, class_names=truth.classes, max_dets=limits)
        self._logger.info(f"Boxes over IoU thresholds:\n{threshold_table(counts['ap'])}")
        self._logger.info(f"Average recall:\n{recall_table(metrics)}")
        numbers = num_objects(truth).tolist()
        self._logger.info(f"By class:\n{class_table(counts['ap'], truth.classes, numbers)}")
        self._results["bbox"] = metrics
        if self._metadata.get("voc_style"):
            every_one = make_detections(rows, truth, "detections", limit=None)
            ap = voc_average_precision(truth, every_one)
            self._results["voc"] = voc_metrics(ap, truth.classes)
            self._logger.info("By VOC's rules:\n" + voc_table(self._results["voc"]))

    def _use_dataset_ids(self, results: list[dict[str, Any]]) -> None:
        """Put the data set's category ids in the place of the model's class indices."""
        to_index = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if to_index is None:
            # Converted by detectron2: the ids are the indices.
            to_index = {i: i for i in self._coco_api.cats}
        to_id = {index: i for i, index in to_index.items()}
        unknown = {d["category_id"] for d in results} - to_id.keys()
        if unknown:
            raise UserError(
                f"{self._metadata.name} has {len(to_id)} classes, but the model found objects of "
                f"class {max(unknown)} (counted from 0): is its number of classes right?"
            )
        for detection in results:
            detection["category_id"] = to_id[detection["category_id"]]

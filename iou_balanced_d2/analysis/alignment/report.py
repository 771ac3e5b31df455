"""The alignment report: one HTML page, its figures and alignment.json."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from numpy.typing import NDArray

from ...data.coco import check_folder
from ...data.inspection import missing_images
from ...errors import UserError
from ...evaluation.detections import GroundTruth, read_detections, read_ground_truth
from ...files import write_text
from ..comparison.runs import json_file_of
from ..page import Page, plain
from ..plots import labelled
from .analysis import Alignment, analyze
from .figures import (
    draw_ap,
    draw_calibration,
    draw_density,
    draw_score_by_iou,
    draw_share_by_iou,
)
from .pictures import draw_cases, misplaced_cases, outranked_cases

_MOST_PICTURES = 8
_MOST_CONFUSED = 12

RULES = {
    "COCO's matching": "Used for AP, the ceilings, the correlation and the calibration. Of each "
    "image and class the 100 best-scored detections, in the order of their scores, take the free "
    "object with the largest IoU, if that reaches the threshold (.5 for the correlation). Those "
    "that take an object are right, the others wrong. Detections on crowds, and on objects "
    "marked difficult unless DATASETS.VOC_DIFFICULT counts or drops them, are left out.",
    "Confusions": "Detections below their class's threshold are left out, the others matched as "
    "above. Those then left over take, in the order of their scores, the free object of another "
    "class with the largest IoU, if that reaches .5.",
    "Best IoU": "Used for score and share by IoU, the density and the pictures. The IoU of each "
    "detection is the largest with any object of its image and class, whatever its score and "
    "whatever the others have taken; 0 without any overlap. Detections that overlap an object that "
    "is left out, as above, more than any other one are left out.",
    "Perfect ranking": "At each threshold all right detections come before all wrong ones, as if "
    "the score was the true IoU and duplicates came last. What is missing to 100 was not "
    "found, or not placed well enough. The gap to AP is what a better score could win.",
    "Perfect placing": "In the order of scores each detection takes the box of the free object "
    "of its class that it overlaps most, at IoU .1 or more; others on the same object are taken "
    "out, as NMS would. AP is then the same at all thresholds. The gap to AP is what better boxes "
    "could win.",
}


def write_alignment_report(
    ground_truth: str,
    detections: Mapping[str, str],
    output_dir: str,
    *,
    image_root: str | None = None,
    difficult: str = "ignore",
) -> dict[str, Any]:
    """Analyse one or several detectors on a data set and write the report.

    Args:
        ground_truth: JSON file in COCO's instance format.
        detections: name of the detector -> JSON file in COCO's result format.
        output_dir: folder for index.html, alignment.json, the figures (PNG and SVG) and, in
            "pictures", the worst cases; made if need be.
        image_root: folder of the images; None for no pictures.
        difficult: the policy for difficult objects, DATASETS.VOC_DIFFICULT.

    Returns:
        the content of alignment.json: name -> numbers.

    Raises:
        UserError: naming the file that is missing or broken, or the folder.
    """
    objects = read_ground_truth(ground_truth, difficult)
    if image_root is not None:
        check_folder(image_root)
        for path in missing_images({"images": objects.images}, image_root)[:1]:
            raise UserError(f"image {path!r}, named by {ground_truth}, is not there")
    analyses = {
        name: analyze(objects, read_detections(file, objects, probabilities=True))
        for name, file in detections.items()
    }
    output = Path(output_dir)
    try:
        (output / "pictures" if image_root else output).mkdir(parents=True, exist_ok=True)
        results = {name: a.results for name, a in analyses.items()}
        content = plain({name: {"file": detections[name], **r} for name, r in results.items()})
        write_text(output / "alignment.json", json.dumps(content, indent=1) + "\n")
        page = _page(results, output, Path(ground_truth).name)
        if image_root is None:
            page.text("No pictures of the worst cases: the folder of the images was not given.")
        else:
            _add_pictures(page, objects, analyses, image_root, output / "pictures")
        write_text(output / "index.html", page.html())
    except OSError as error:
        raise UserError(f"{output_dir!r} can't be written: {error.strerror}") from error
    return content


def dataset_files(data_set: str) -> dict[str, Any]:
    """The arguments ``ground_truth`` and ``image_root`` of the report for a registered data set.

    Args:
        data_set: its name.

    Returns:
        the two arguments; ``image_root`` is None where the folder is not there.

    Raises:
        UserError: if the data set is not registered or has no JSON file.
    """
    json_file, root = json_file_of(data_set), MetadataCatalog.get(data_set).get("image_root")
    found = root if root and os.path.isdir(root) else None
    return {"ground_truth": json_file, "image_root": found}


def _page(results: Mapping[str, dict[str, Any]], output: Path, data_set: str) -> Page:
    """The page up to the pictures."""
    page = Page("Does the score know how good the box is?")
    for name, result in results.items():
        page.text(result["verdict"] if len(results) == 1 else f"{name}: {result['verdict']}")
    first = next(iter(results.values()))
    counts = ", ".join(f"{r['num_detections']} of {name}" for name, r in results.items())
    page.text(
        f"{data_set}: {first['num_images']} images, {first['num_objects']} objects. "
        f"Detections: {counts}."
    )
    _add_ap(page, results, output)
    _add_alignment(page, results, output)
    page.heading("Is the score a probability?")
    page.text(
        "A calibrated score lies on the diagonal: of the detections with score .7, 70 % are "
        "right. ECE is the mean distance from it, weighted by the number of detections."
    )
    page.figure(
        draw_calibration(labelled(results), output / "calibration.png"), "Calibration curves"
    )
    _add_classes(page, results)
    _add_thresholds(page, results)
    page.heading("Rules")
    for name, text in RULES.items():
        page.text(f"{name}. {text}")
    return page


def _add_ap(page: Page, results: Mapping[str, dict[str, Any]], output: Path) -> None:
    page.heading("What there is to win")
    page.text(
        "AP as it is, AP if the scores ranked the boxes perfectly, and AP if the boxes were placed "
        "perfectly. The IoU-balanced classification loss works on the first gap, the IoU-balanced "
        "box loss on the second."
    )
    rows = []
    for name, result in results.items():
        kinds = {"": result["ap"], ", perfect ranking": result["ceilings"]["perfect_ranking"]}
        kinds[", perfect placing"] = result["ceilings"]["perfect_placing"]
        for text, ap in kinds.items():
            rows.append([name + text, *(ap[key] for key in ("AP", "AP50", "AP75", "AP90"))])
    page.table(["", "AP", "AP50", "AP75", "AP90"], rows)
    page.figure(draw_ap(labelled(results), output / "ap.png"), "AP at IoU .50 to .95")


def _add_alignment(page: Page, results: Mapping[str, dict[str, Any]], output: Path) -> None:
    page.heading("Score and IoU")
    page.text(
        "Correlation of the score with the IoU, over the right detections at IoU .5; and the "
        "objects with a well-placed box (IoU .5 or more) that a worse-placed one (.3 or more) "
        "outranks, with the IoU that this costs."
    )
    rows = []
    for name, result in results.items():
        found, wrong = result["correlation"], result["outranked"]
        outranked = f"{wrong['objects_outranked']} of {wrong['objects_detected']}"
        numbers = [found["pearson"], found["spearman"]]
        rows.append([name, found["count"], *numbers, outranked, wrong["mean_iou_lost"]])
    headers = ["", "right", "Pearson", "Spearman", "outranked", "mean IoU lost"]
    page.table(headers, rows, digits=3)
    page.text("Mean score of the detections by the IoU of their box (the paper's Fig. 2):")
    page.figure(
        draw_score_by_iou(labelled(results), output / "score_by_iou.png"), "Mean score by IoU"
    )
    page.text("Share of the detections by the IoU of their box (the paper's Fig. 3):")
    page.figure(draw_share_by_iou(labelled(results), output / "share_by_iou.png"), "Share by IoU")
    page.text("How many detections there are of each IoU and score:")
    page.figure(draw_density(labelled(results), output / "density.png"), "Density of score and IoU")


def _add_classes(page: Page, results: Mapping[str, dict[str, Any]]) -> None:
    page.heading("By class")
    rows = [
        [class_name, *([name] if len(results) > 1 else []), of_class["num_objects"]]
        + [of_class["ap"][key] for key in ("AP", "AP50", "AP75", "AP90")]
        + [f"{of_class['correlation']['spearman']:.2f}".replace("nan", "–")]
        for class_name in next(iter(results.values()))["classes"]
        for name, result in results.items()
        for of_class in [result["classes"][class_name]]
    ]
    detector = ["detector"] if len(results) > 1 else []
    headers = ["class", *detector, "objects", "AP", "AP50", "AP75", "AP90", "Spearman"]
    page.table(headers, rows)


def _add_thresholds(page: Page, results: Mapping[str, dict[str, Any]]) -> None:
    page.heading("From which score on?")
    page.text(
        "The score threshold of each class with the largest F1 at IoU .5, chosen on these very "
        "images, and what is right among the detections kept (precision) and found of the objects "
        "(recall)."
    )
    for name, result in results.items():
        rows = [
            [class_name, of_class["num_objects"], *of_class["best_threshold"].values()]
            for class_name, of_class in result["classes"].items()
        ]
        page.table([name, "objects", "threshold", "precision", "recall", "F1"], rows, digits=2)
    page.text(
        "Which class the objects are detected as, at these thresholds and IoU .5: a row is what is "
        "there, a column what is detected."
    )
    for name, result in results.items():
        _add_confusion(page, name, list(result["classes"]), result["confusion"])


def _add_confusion(page: Page, name: str, classes: Sequence[str], matrix: NDArray[Any]) -> None:
    """The matrix, of many classes those that are confused most."""
    between = matrix[:-1, :-1] - np.diag(np.diag(matrix)[:-1])
    most = np.argsort(-(between.sum(axis=0) + between.sum(axis=1)), kind="stable")
    shown = np.sort(most[:_MOST_CONFUSED])
    if len(shown) < len(classes):
        page.text(f"The {len(shown)} of {len(classes)} classes that are confused most.")
    part = matrix[np.ix_([*shown, -1], [*shown, -1])]
    names = [classes[k] for k in shown]
    rows = [[row, *counts] for row, counts in zip([*names, "(no object)"], part, strict=True)]
    rows[-1][-1] = "–"
    page.table([name, *names, "(missed)"], rows)


def _add_pictures(
    page: Page,
    ground_truth: GroundTruth,
    analyses: Mapping[str, Alignment],
    image_root: str,
    folder: Path,
) -> None:
    kinds = {
        "misplaced": (misplaced_cases, "high score, low IoU", "Orange: the detection."),
        "outranked": (
            outranked_cases,
            "a well-placed box outranked",
            "Orange: the best-scored box of the object; blue: a better-placed one.",
        ),
    }
    for i, (name, alignment) in enumerate(analyses.items()):
        for kind, (find, title, legend) in kinds.items():
            page.heading(f"{name}: {title}")
            cases = find(alignment, _MOST_PICTURES)
            files, captions = draw_cases(
                ground_truth, alignment, cases, image_root, folder / f"{kind}_{i}"
            )
            page.text(f"{legend} White, dashed: the object." if files else "None.")
            page.tiles(files, captions)

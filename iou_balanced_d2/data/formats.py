"""Other formats than the one expected: recognised, and answered with what reads them."""

import os
from pathlib import Path
from typing import Any

_CONVERT = "python tools/convert_dataset.py"
# Keys of the file, or of the first item of its list -> what it is, and what to do.
_BY_KEYS = (
    ({"image_id", "score", "bbox"}, "these are detections, name the annotations instead"),
    ({"shapes", "imagePath"}, f"this is labelme's: {_CONVERT} labelme FOLDER OUT.json"),
    ({"_via_img_metadata"}, f"a project of VGG's Image Annotator: {_CONVERT} via FILE OUT.json"),
    ({"filename", "regions"}, f"this is VGG's Image Annotator's: {_CONVERT} via FILE OUT.json"),
    ({"data", "annotations"}, "this is Label Studio's own JSON, export it as COCO"),
    ({"categories", "items"}, "this is Datumaro's JSON, export it as COCO"),
)
_BY_TAG = {
    b"<annotations": f"this is CVAT's XML: {_CONVERT} cvat FILE OUT.json",
    b"<annotation": f"this is VOC's XML: DATASETS.VOC_FOLDER, or {_CONVERT} voc FOLDER OUT.json",
}


def hint_for_json(content: Any) -> str:
    """What JSON that isn't in COCO's format is instead: " (what it is and what to do)", or ""."""
    first = content
    if isinstance(content, dict) and content and "annotations" not in content:
        values = list(content.values())
        if all(isinstance(v, dict) and {"filename", "regions"} <= v.keys() for v in values):
            first = values[0]  # VIA's annotations, by file
    elif isinstance(content, list) and content:
        first = content[0]
    keys = set(first) if isinstance(first, dict) else set()
    return next((f" ({what})" for needed, what in _BY_KEYS if needed <= keys), "")


def hint_for_text(head: bytes) -> str:
    """What a file that is not JSON is instead, by its first bytes."""
    return next((f" ({what})" for tag, what in _BY_TAG.items() if tag in head), "")


def hint_for_folder(path: str) -> str:
    """What a folder holds that was given where a file, or another layout, is expected."""
    if not os.path.isdir(path):
        return ""
    names = {name for name in os.listdir(path) if not name.startswith(".")}
    ends = {Path(name).suffix.lower(): name for name in sorted(names, reverse=True)}
    if "data.yaml" in names:
        return " (a data set of YOLO's layout: DATASETS.YOLO_FOLDER, [name, folder, split])"
    if {"Annotations", "ImageSets"} <= names:
        return " (a data set of VOC's layout: DATASETS.VOC_FOLDER, [name, folder, split])"
    if ".xml" in ends:
        return f" (it holds XML files: {_CONVERT} voc FOLDER OUT.json, if they are VOC's)"
    if ".json" in ends:
        return f" (it holds JSON files, such as {ends['.json']}; name one that is in COCO format)"
    return ""

"""What the numbers say, in words."""

import math
from collections.abc import Mapping
from typing import Any

# Fewer objects than this: another test set may well say something else.
_FEW_OBJECTS = 100
# AP points: less is not worth a training.
_LITTLE = 1.0
# A gap so many times the other one is worked on first.
_CLEARLY = 2.0
_SCORE = "the IoU-balanced classification loss (MODEL.IOU_BALANCED.CLS_ETA)"
_BOX = "the IoU-balanced box loss (MODEL.IOU_BALANCED.LOC_LAMBDA)"


def verdict(results: Mapping[str, Any]) -> str:
    """What there is to win for a detector, and what to try.

    Args:
        results: "ap", "ceilings", "num_objects" and "num_images" of an analysis.

    Returns:
        one to three sentences.
    """
    ap, objects = results["ap"]["AP"], results["num_objects"]
    if math.isnan(ap):
        return "There is no object to find, so nothing can be said."
    ranking, placing = (
        results["ceilings"][f"perfect_{kind}"]["AP"] - ap for kind in ("ranking", "placing")
    )
    text = f"AP is {ap:.0f}. "
    text += f"Perfect ranking would win {ranking:.0f} AP, perfect placing {placing:.0f}: "
    text += _advice(ranking, placing) + "."
    if objects < _FEW_OBJECTS:
        images = results["num_images"]
        text += f" Few data: {objects} objects in {images} images. Others may say something else."
    return text


def _advice(ranking: float, placing: float) -> str:
    if max(ranking, placing) < _LITTLE:
        return "neither loss can win much with these detections"
    if ranking > _CLEARLY * placing:
        return f"try {_SCORE} first"
    if placing > _CLEARLY * ranking:
        return f"try {_BOX} first"
    return f"try {_SCORE} together with {_BOX}"

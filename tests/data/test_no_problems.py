"""What the check of a data set lets pass, training and evaluation can use.

Data sets are drawn with the habits and faults of people's files. Either the check refuses one in a
single line, or every image is mapped, and detections that are its boxes have an AP of 100.
"""

import json
import math
import tempfile
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from PIL import Image

from iou_balanced_d2.data import check_datasets, register_datasets_of
from iou_balanced_d2.data.coco_format import read_coco_json
from iou_balanced_d2.data.inspection import inspect_annotations
from iou_balanced_d2.data.loading import CheckedMapper, build_mapper, load_training_dicts
from iou_balanced_d2.errors import UserError

from ..command import forget_own_data
from ..toy import toy_config
from .test_coco_format import ap_of

CONFIG = toy_config(
    "DATASETS.TRAIN", ("own",), "DATASETS.TEST", ("own",),
    "INPUT.MIN_SIZE_TRAIN", (32,), "INPUT.MIN_SIZE_TEST", 32,
)  # fmt: skip
MODES = {".png": ("RGB", "L", "P", "RGBA", "1", "LA"), ".jpg": ("RGB", "L", "CMYK"),
         ".tif": ("RGB", "L"), ".bmp": ("RGB", "P"), ".webp": ("RGB", "RGBA")}  # fmt: skip
DEEP = {".png": ["I;16"], ".tif": ["F", "I;16"]}  # which is read as nearly black or white
_JUNK = st.sampled_from(
    [None, "", "0", "1", "x", math.nan, math.inf, -1, 0, 1, 10**400, [], {}, True]
)


def seldom(strategy, usual, times=8):
    """Mostly ``usual``, so that data sets with few faults are drawn as well."""
    # (one_of takes the same strategy several times for one.)
    return st.integers(1, times).flatmap(lambda n: strategy if n == times // 2 else usual)


def id_of(place):
    """The id of what stands at a place of its list, in one of the ways that people write it."""
    return seldom(st.sampled_from([str(place), -place, 2**64 + place, f"{place}a", 0]),
                  st.just(place + 1), 40)  # fmt: skip


@st.composite
def pictures(draw):
    """What an image file is: format, mode, stored size, orientation, fault."""
    suffix = draw(st.sampled_from(sorted(MODES)))
    width, height = draw(st.integers(4, 48)), draw(st.integers(4, 48))
    if draw(seldom(st.just(True), st.just(False), 60)):
        width, height = 1, 3000
    return {
        "suffix": suffix,
        "mode": draw(seldom(st.sampled_from(DEEP.get(suffix, MODES[suffix])),
                            st.sampled_from(MODES[suffix]), 40)),
        "size": (width, height),
        "orientation": draw(seldom(st.integers(0, 9), st.just(1), 3)),
        "fault": draw(seldom(st.sampled_from(["missing", "empty", "cut", "text", "folder"]),
                             st.just(""), 60)),
    }  # fmt: skip


@st.composite
def boxes(draw, width, height):
    """XYWH on a grid of quarter pixels inside the image; seldom something else."""
    x, y = draw(st.integers(0, 4 * width - 2)), draw(st.integers(0, 4 * height - 2))
    w, h = draw(st.integers(1, 4 * width - x)), draw(st.integers(1, 4 * height - y))
    box = [x / 4, y / 4, w / 4, h / 4]
    bad = st.one_of(
        st.just([x / 4, y / 4, (x + w) / 4, (y + h) / 4]),
        st.just([x / 4 / width, y / 4 / height, w / 4 / width, h / 4 / height]),
        st.lists(st.one_of(st.floats(), st.integers(), _JUNK), min_size=3, max_size=5),
        _JUNK,
    )
    return draw(seldom(bad, st.just(box), 60))


@st.composite
def annotations(draw, place, images, categories):
    image = draw(st.sampled_from(images))
    annotation = {
        "id": draw(id_of(place)),
        "image_id": draw(seldom(_JUNK, st.just(image["id"]), 60)),
        "category_id": draw(seldom(_JUNK, st.sampled_from(categories).map(lambda c: c["id"]), 60)),
        "bbox": draw(boxes(int(image["width"]), int(image["height"]))),
        "area": draw(seldom(st.one_of(_JUNK, st.floats(), st.just(1e12)), st.just(30), 5)),
        "iscrowd": draw(seldom(_JUNK, st.sampled_from([0, 0, 0, 1]), 60)),
        "segmentation": draw(st.one_of(_JUNK, st.just([[1, 2, 3]]), st.just({"counts": "?"}))),
        "keypoints": draw(_JUNK),
        "ignore": draw(seldom(_JUNK, st.sampled_from([0, 0, 1, "0", None]), 60)),
    }  # fmt: skip
    left_out = draw(st.sets(st.sampled_from(["id", "area", "iscrowd", "segmentation", "ignore"])))
    return {key: value for key, value in annotation.items() if key not in left_out}


@st.composite
def data_sets(draw):
    """(pictures by file name, the JSON's content, its encoding)."""
    files, images = {}, []
    for place in range(draw(st.integers(1, 3))):
        picture = draw(pictures())
        name = draw(st.sampled_from(["", "ä ", "sub/", "sub\\"])) + f"{place}{picture['suffix']}"
        files[name.replace("\\", "/")] = picture
        width, height = picture["size"]
        if draw(st.booleans()) and picture["orientation"] in (5, 6, 7, 8):
            width, height = height, width
        size = seldom(st.sampled_from([0.5, 47]), st.just(0), 60)
        images.append({"id": draw(id_of(place)), "file_name": name,
                       "width": width + draw(size), "height": height + draw(size)})  # fmt: skip
    name_of = lambda i: seldom(st.sampled_from(["", "same", "a/b", " "]), st.just(f"c{i}"), 40)  # noqa: E731
    number = draw(st.integers(1, 3))
    categories = [{"id": draw(id_of(i)), "name": draw(name_of(i))} for i in range(number)]
    number = draw(st.integers(0, 8))
    content = {
        "images": images,
        "annotations": [draw(annotations(i, images, categories)) for i in range(number)],
        "categories": categories,
    }
    return files, content, draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))


def write(folder, files, content, encoding):
    for name, picture in files.items():
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if picture["fault"] == "missing":
            continue
        if picture["fault"] == "folder":
            path.mkdir()
            continue
        exif = Image.Exif()
        exif[0x0112] = picture["orientation"]
        Image.new(picture["mode"], picture["size"]).save(path, exif=exif)
        data = path.read_bytes()
        faulty = {"empty": b"", "cut": data[: len(data) // 2], "text": b"not an image"}
        path.write_bytes(faulty.get(picture["fault"], data))
    (folder / "data.json").write_bytes(json.dumps(content).encode(encoding))


def map_all(cfg, dicts, *, is_train):
    mapper = CheckedMapper(build_mapper(cfg, is_train=is_train), "own")
    for record in dicts:
        image = mapper(record)
        assert torch.isfinite(image["image"].float()).all()
        if is_train:
            found = image["instances"].gt_boxes.tensor
            assert torch.isfinite(found).all()
            assert (found[:, 2:] > found[:, :2]).all()


def refusal(cfg):
    try:
        check_datasets(cfg, training=True, read_images=True)
    except UserError as error:
        return str(error)
    return ""


def check_and_use(data_set):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, *data_set)
        forget_own_data()
        cfg = CONFIG.clone()
        cfg.DATASETS.COCO_JSON = [["own", f"{folder}/data.json", f"{folder}/images"]]
        cfg.MODEL.RETINANET.NUM_CLASSES = len(data_set[1]["categories"])
        if refused := refusal(cfg):
            assert "\n" not in refused
            assert str(folder) in refused or "'own'" in refused
            event("refused")
            return
        register_datasets_of(cfg)
        map_all(cfg, load_training_dicts(cfg), is_train=True)
        map_all(cfg, DatasetCatalog.get("own"), is_train=False)
        report = inspect_annotations(read_coco_json(str(folder / "data.json")))
        event("with problems" if report.problems else "no problems")
        ap = ap_of("own")
        assert report.problems or math.isnan(ap) or ap == pytest.approx(100.0)


FAST = settings(
    max_examples=60, deadline=None, database=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@FAST
@given(data_sets())
def test_what_passes_the_check_can_be_used(data_set):
    check_and_use(data_set)


@pytest.mark.slow
@settings(FAST, max_examples=500, derandomize=False, print_blob=True)
@given(data_sets())
def test_what_passes_the_check_can_be_used_500_times(data_set):
    check_and_use(data_set)

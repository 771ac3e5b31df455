"""Boxes of Cityscapes from a small tree in its own layout."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin_meta import _get_builtin_metadata

from iou_balanced_d2.data import prepare_dataset
from iou_balanced_d2.data.cityscapes import (
    CITYSCAPES_CLASSES,
    register_cityscapes,
    visible_things,
)
from iou_balanced_d2.engine import load_config
from iou_balanced_d2.errors import UserError
from iou_balanced_d2.model_zoo import get_config_file

TRAIN, VAL = "cityscapes_fine_bbox_train", "cityscapes_fine_bbox_val"


def rectangle(x1, y1, x2, y2):
    """The vertices of the pixels x1..x2, y1..y2, both included."""
    return [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]


def thing(label, *box, **fields):
    return {"label": label, "polygon": rectangle(*box), **fields}


def write_image(root, split, name, objects):
    """One image of 40 x 20 pixels and its polygons, in the layout of the real set."""
    city = name.split("_")[0]
    for folder in ("leftImg8bit", "gtFine"):
        (root / "cityscapes" / folder / split / city).mkdir(parents=True, exist_ok=True)
    image = root / f"cityscapes/leftImg8bit/{split}/{city}/{name}_leftImg8bit.png"
    cv2.imwrite(str(image), np.zeros((20, 40, 3), np.uint8))
    folder = root / f"cityscapes/gtFine/{split}/{city}"
    content = {"imgHeight": 20, "imgWidth": 40, "objects": objects}
    (folder / f"{name}_gtFine_polygons.json").write_text(json.dumps(content))
    (folder / f"{name}_gtFine_labelIds.png").write_bytes(b"")


SKY = thing("sky", 0, 0, 39, 19)
OBJECTS = [
    SKY,
    thing("car", 2, 5, 20, 15),
    thing("persongroup", 30, 2, 35, 10),
    thing("person", 15, 1, 25, 18),
    thing("bus", 3, 6, 5, 8, deleted=1),
    thing("truck", 16, 2, 20, 10),
    thing("person", 15, 0, 25, 19),
    thing("rider", 36, 15, 60, 30),
    thing("license plate", 2, 5, 3, 15),
    thing("pole", 10, 0, 10, 19),
]


@pytest.fixture
def root(tmp_path, monkeypatch):
    """3 training images of 2 cities and 1 validation image, registered in an emptied catalog."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    write_image(tmp_path, "train", "ulm_000001_000019", OBJECTS)
    write_image(tmp_path, "train", "ulm_000000_000019", [SKY])
    write_image(tmp_path, "train", "aachen_000000_000019", [SKY, thing("train", 0, 0, 39, 19)])
    write_image(tmp_path, "val", "bonn_000000_000019", [thing("bicyclegroup", 1, 1, 2, 2)])
    before = dict(DatasetCatalog), dict(MetadataCatalog)
    for name in (TRAIN, VAL):
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)
    register_cityscapes(str(tmp_path))
    yield tmp_path
    for catalog, content in zip((DatasetCatalog, MetadataCatalog), before, strict=True):
        catalog.clear()
        catalog.update(content)


def content_of(name):
    prepare_dataset(name)
    return json.loads(Path(MetadataCatalog.get(name).json_file).read_text())


def boxes_of(objects, height=20, width=40):
    """(class, is_group, box, area) of each visible object."""
    polygons = [(o["label"], np.array(o["polygon"], dtype=np.float64)) for o in objects]
    things, _ = visible_things(polygons, height=height, width=width)
    return [described(thing) for thing in things]


def described(thing):
    """(class, is_group, XYXY box, area) of an object."""
    label, (x, y, w, h), fields = thing
    box = (x, y, x + w, y + h)
    return CITYSCAPES_CLASSES[label], bool(fields["iscrowd"]), box, fields["area"]


def test_the_classes_are_detectron2s():
    assert list(CITYSCAPES_CLASSES) == _get_builtin_metadata("cityscapes")["thing_classes"]
    for name in (TRAIN, VAL):
        assert MetadataCatalog.get(name).thing_classes == list(CITYSCAPES_CLASSES)
        assert MetadataCatalog.get(name).evaluator_type == "coco"


def test_an_image_of_everything(root):
    content = content_of(TRAIN)
    names = [image["file_name"] for image in content["images"]]
    assert names == [
        "aachen/aachen_000000_000019_leftImg8bit.png",
        "ulm/ulm_000000_000019_leftImg8bit.png",
        "ulm/ulm_000001_000019_leftImg8bit.png",
    ]
    found = [
        (CITYSCAPES_CLASSES[a["category_id"] - 1], a["iscrowd"], a["bbox"], a["area"])
        for a in content["annotations"]
        if a["image_id"] == 3
    ]
    assert found == [
        # Cut off at x = 15 by a person; the pole hides a column within, the licence plate nothing.
        ("car", 0, [2, 5, 13, 11], 13 * 11 - 11),
        ("person", 1, [30, 2, 6, 9], 54),
        ("person", 0, [15, 0, 11, 20], 220),
        ("rider", 0, [36, 15, 4, 5], 20),
    ]
    assert content["info"]["hidden_objects"] == 2, "the first person and the truck"


def test_occlusion():
    far, near = thing("car", 0, 0, 9, 9), thing("bus", 5, 0, 30, 9)
    assert boxes_of([far, near])[0] == ("car", False, (0, 0, 5, 10), 50)
    assert boxes_of([near, far])[1] == ("car", False, (0, 0, 10, 10), 100)
    # What hides the middle splits the object, not its box.
    middle = thing("building", 4, 0, 5, 9)
    assert boxes_of([far, middle]) == [("car", False, (0, 0, 10, 10), 80)]


def test_what_is_hidden_is_left_out_and_counted(root):
    hidden = [SKY, thing("car", 1, 1, 3, 3), thing("rider", 1, 1, 3, 3), thing("wall", 0, 0, 9, 9)]
    write_image(root, "val", "bonn_000000_000019", hidden)
    content = content_of(VAL)
    assert content["annotations"] == []
    assert content["info"]["hidden_objects"] == 2


def test_groups_are_crowds_of_their_class(root):
    (group,) = content_of(VAL)["annotations"]
    assert (group["iscrowd"], group["category_id"], group["bbox"]) == (1, 8, [1, 1, 2, 2])
    (loaded,) = DatasetCatalog.get(VAL)[0]["annotations"]
    assert (loaded["iscrowd"], loaded["category_id"]) == (1, 7)


def test_deleted_objects_neither_count_nor_hide(root):
    objects = [thing("car", 0, 0, 9, 9), thing("bus", 0, 0, 5, 5, deleted=1)]
    write_image(root, "val", "bonn_000000_000019", objects)
    assert [a["bbox"] for a in content_of(VAL)["annotations"]] == [[0, 0, 10, 10]]


def test_a_licence_plate_belongs_to_its_vehicle():
    assert boxes_of([thing("car", 0, 0, 9, 9), thing("license plate", 0, 8, 9, 9)]) == [
        ("car", False, (0, 0, 10, 10), 100)
    ]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((-5, -5, 3, 2), (0, 0, 4, 3)),
        ((35, 15, 90, 90), (35, 15, 40, 20)),
        ((-9, -9, 99, 99), (0, 0, 40, 20)),
    ],
)
def test_a_polygon_that_leaves_the_image_is_clipped(box, expected):
    assert [b[2] for b in boxes_of([thing("car", *box)])] == [expected]


@pytest.mark.parametrize("box", [(-9, -9, -2, -2), (50, 50, 60, 60), (40, 0, 60, 19)])
def test_a_polygon_outside_the_image_is_hidden(box):
    assert boxes_of([thing("car", *box)]) == []


@pytest.mark.parametrize(
    ("polygon", "expected"),
    [([[3, 4]], (3, 4, 4, 5)), ([[3, 4], [8, 4]], (3, 4, 9, 5)), ([], None)],
)
def test_polygons_of_few_vertices(polygon, expected):
    found = boxes_of([{"label": "car", "polygon": np.reshape(polygon, (-1, 2))}])
    assert [b[2] for b in found] == ([] if expected is None else [expected])


@pytest.mark.parametrize("seed", range(5))
def test_bounds_of_random_scenes(seed):
    """Against a picture per object, each painted over by those after it."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([*CITYSCAPES_CLASSES, "cargroup", "sky"], size=300)
    objects = [(str(label), rng.integers(-10, 60, size=2) + rng.integers(-9, 10, (5, 2)) * 1.0)
               for label in labels]  # fmt: skip
    masks = np.zeros((300, 50, 50), np.uint8)
    for i, (_, polygon) in enumerate(objects):
        cv2.fillPoly(masks[i], [polygon.astype(np.int32)], 1)
    expected = []
    for i, (label, _) in enumerate(objects):
        ys, xs = np.nonzero(masks[i] & ~masks[i + 1 :].any(axis=0))
        if len(xs) and label != "sky":
            box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            expected.append((label, box, len(xs)))
    things, hidden = visible_things(objects, height=50, width=50)
    found = [(name + "group" * is_group, box, area)
             for name, is_group, box, area in map(described, things)]  # fmt: skip
    assert found == expected
    assert hidden == sum(label != "sky" for label in labels) - len(expected) > 0


def test_loaded_for_training(root):
    records = DatasetCatalog.get(TRAIN)
    assert [len(r["annotations"]) for r in records] == [1, 0, 4]
    assert all(Path(r["file_name"]).is_file() for r in records)
    assert {(r["height"], r["width"]) for r in records} == {(20, 40)}


def test_changed_added_and_removed_annotations_are_seen(root):
    assert len(content_of(VAL)["images"]) == 1
    write_image(root, "val", "bonn_000001_000019", [thing("car", 0, 0, 9, 9)])
    assert len(content_of(VAL)["images"]) == 2
    write_image(root, "val", "bonn_000001_000019", [SKY])
    assert len(content_of(VAL)["annotations"]) == 1
    shutil.rmtree(root / "cityscapes/gtFine/val/bonn")
    write_image(root, "val", "bonn_000000_000019", [thing("car", 0, 0, 9, 9)])
    assert [len(content_of(VAL)[k]) for k in ("images", "annotations")] == [1, 1]
    caches = list((root / "cityscapes/iou_balanced_cache").glob("*.json"))
    assert len(caches) == 1


ANNOTATION = "cityscapes/gtFine/val/bonn/bonn_000000_000019_gtFine_polygons.json"
OBJECT = '{"imgWidth": 4, "imgHeight": 4, "objects": [%s]}'
# What is wrong -> (change of the tree, what the message must say).
BROKEN = {
    "no tree": (
        lambda r: shutil.rmtree(r / "cityscapes/gtFine"),
        "gtFine/val: not found, or has no",
    ),
    "no annotation": (lambda r: (r / ANNOTATION).unlink(), "has no <city>/*_gtFine"),
    "no image": (lambda r: shutil.rmtree(r / "cityscapes/leftImg8bit"), "leftImg8bit.png: not f"),
    "broken JSON": (lambda r: (r / ANNOTATION).write_text("{"), "polygons.json: not an annotation"),
    "a list": (lambda r: (r / ANNOTATION).write_text("[]"), "polygons.json: not an annotation"),
    "no size": (lambda r: (r / ANNOTATION).write_text('{"objects": []}'), "KeyError('imgWidth')"),
    "size 0": (
        lambda r: (r / ANNOTATION).write_text((OBJECT % "").replace("4", "0")),
        "the image size is 0 x 0",
    ),
    "no label": (lambda r: (r / ANNOTATION).write_text(OBJECT % "{}"), "KeyError('label')"),
    "odd polygon": (
        lambda r: (r / ANNOTATION).write_text(OBJECT % '{"label": "car", "polygon": [[1, "a"]]}'),
        "polygons.json: not an annotation",
    ),
    **{
        f"vertex {x}": (
            lambda r, x=x: (r / ANNOTATION).write_text(
                OBJECT % f'{{"label": "car", "polygon": [[0, 0], [2, 2], [{x}, 2]]}}'
            ),
            "polygons.json: a 'car' has a vertex that is no place in the image",
        )
        for x in ("NaN", "Infinity", "1e300", "-40000")
    },
    "huge size": (
        lambda r: (r / ANNOTATION).write_text((OBJECT % "").replace("4", "10000000")),
        "the image size is 10000000 x 10000000",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_input_is_one_line(root, case):
    change, expected = BROKEN[case]
    change(root)
    with pytest.raises(UserError) as caught:
        prepare_dataset(VAL)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(f"data set {VAL!r}: ")
    assert "\n" not in str(caught.value)
    assert not list(root.rglob(f"{VAL}-*"))


@pytest.mark.parametrize("depth", [50, 101])
def test_the_configs_arithmetic(depth):
    cfg = load_config(get_config_file(f"Cityscapes-Detection/retinanet_R_{depth}_FPN.yaml"))
    iterations = 64 * 2975 / cfg.SOLVER.IMS_PER_BATCH
    assert iterations == cfg.SOLVER.MAX_ITER
    assert cfg.SOLVER.STEPS == (round(iterations * 8 / 12), round(iterations * 11 / 12))
    assert 0.01 * cfg.SOLVER.IMS_PER_BATCH / 16 == cfg.SOLVER.BASE_LR
    assert len(CITYSCAPES_CLASSES) == cfg.MODEL.RETINANET.NUM_CLASSES
    assert cfg.MODEL.RESNETS.DEPTH == depth
    assert f"R-{depth}.pkl" in cfg.MODEL.WEIGHTS
    assert (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) == (TRAIN, VAL)

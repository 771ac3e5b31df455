"""Annotations as people write them: read as they are meant, or refused with the place."""

import codecs
import copy
import gzip
import json
import math

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from iou_balanced_d2.data import check_datasets, prepare_dataset, register_coco_json
from iou_balanced_d2.data.coco_format import clean_coco, load_json, read_coco_json
from iou_balanced_d2.data.inspection import inspect_annotations, inspect_images, missing_images
from iou_balanced_d2.data.loading import load_training_dicts
from iou_balanced_d2.engine import load_config
from iou_balanced_d2.errors import UserError
from iou_balanced_d2.evaluation import BoxEvaluator
from iou_balanced_d2.model_zoo import get_config_file

from ..command import forget_own_data

CONFIG = get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")


@pytest.fixture
def content():
    """3 images, 3 classes, 8 boxes, all as COCO wants them."""
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 100, "height": 80} for i in (1, 2, 3)
        ],
        "annotations": [
            {
                "id": n,
                "image_id": n % 3 + 1,
                "category_id": (3, 5, 9)[n % 3],
                "bbox": [5.0 * n, 4.0 * n, 20.0 + n, 16.0 + n],
                "area": (20.0 + n) * (16.0 + n),
                "iscrowd": 0,
            }
            for n in range(1, 9)
        ],
        "categories": [{"id": 9, "name": "c"}, {"id": 3, "name": "a"}, {"id": 5, "name": "b"}],
    }


def with_annotations(content, **fields):
    """All annotations changed: a field's value, or a function of the annotation's place."""
    for i, annotation in enumerate(content["annotations"]):
        for field, value in fields.items():
            annotation[field] = value(i) if callable(value) else value
            if annotation[field] is ...:
                del annotation[field]
    return content


def test_good_annotations_stay_as_they_are(content):
    clean = clean_coco(copy.deepcopy(content))
    assert clean["info"] == {"repairs": {}, "problems": {}}
    assert clean["images"] == content["images"]
    assert clean["annotations"] == content["annotations"]
    assert [c["name"] for c in clean["categories"]] == ["a", "b", "c"]  # detectron2's order
    assert clean_coco(clean) == clean


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("annotation id", {"id": lambda i: f"box-{i}"}),
        ("annotation id", {"id": lambda i: i if i % 2 else f"box-{i}"}),
        ("annotation id", {"id": lambda i: -i}),
        ("annotation id", {"id": lambda i: i}),  # 0 is COCOeval's "no match"
        ("annotation id", {"id": lambda i: 2**64 + i}),
        ("annotation id", {"id": 7}),
        ("annotation id", {"id": None}),
        ("annotation id", {"id": ...}),
        ("area", {"area": ...}),
        ("area", {"area": None}),
        ("area", {"area": "300"}),
        ("area", {"area": math.nan}),
        ("area", {"area": 0}),
        ("area", {"area": -1}),
        ("iscrowd", {"iscrowd": None}),
        ("iscrowd", {"iscrowd": "0"}),
        ("iscrowd", {"iscrowd": "false"}),
        (None, {"iscrowd": ...}),
        (None, {"iscrowd": False}),
        (None, {"segmentation": [[1, 2, 3, 4]]}),
        (None, {"segmentation": [1, 2, 3, 4, 5, 6]}),
        (None, {"segmentation": []}),
        (None, {"segmentation": {"size": [80, 100], "counts": "broken"}}),
        (None, {"keypoints": "none"}),
    ],
)
def test_what_is_meant_is_read_and_counted(content, kind, fields):
    """Each habit gives the annotations that the good file gives, but for ids."""
    number = 8
    if kind == "annotation id" and callable(fields["id"]):
        ids = [fields["id"](i) for i in range(8)]
        number = sum(type(i) is str or not 0 < i < 2**53 for i in ids)
    elif fields.get("id") == 7:
        number = 7  # the first of them may keep it
    expected = clean_coco(copy.deepcopy(content))["annotations"]
    clean = clean_coco(with_annotations(content, **fields))
    assert {k: v[0] for k, v in clean["info"]["repairs"].items()} == (
        {} if kind is None else {kind: number}
    )
    ids = [a.pop("id") for a in clean["annotations"]]
    assert len(set(ids)) == 8
    assert min(ids) > 0
    assert clean["annotations"] == [{k: v for k, v in a.items() if k != "id"} for a in expected]


@pytest.mark.parametrize(
    ("field", "section", "change"),
    [
        ("image_id", "images", str),
        ("image_id", "images", lambda i: -i),
        ("image_id", "images", lambda i: 2**70 + i),
        ("category_id", "categories", lambda i: f"class {i}"),
    ],
)
def test_odd_ids_of_images_and_categories_are_numbered(content, field, section, change):
    for row in content[section]:
        row["id"] = change(row["id"])
    for annotation in content["annotations"]:
        annotation[field] = change(annotation[field])
    clean = clean_coco(content)
    assert sorted(row["id"] for row in clean[section]) == [1, 2, 3]
    old_ids = [row["id"] for row in content[section]]
    key = (lambda row: row["name"]) if section == "categories" else (lambda row: row["file_name"])
    old_id_of = {key(row): row["id"] for row in content[section]}
    assert {row["original_id"] for row in clean[section]} == set(old_ids)
    assert all(row["original_id"] == old_id_of[key(row)] for row in clean[section])
    name_of = {row["id"]: row.get("name", row.get("file_name")) for row in clean[section]}
    old = {row["id"]: row.get("name", row.get("file_name")) for row in content[section]}
    assert [name_of[a[field]] for a in clean["annotations"]] == [
        old[a[field]] for a in content["annotations"]
    ]
    assert list(clean["info"]["repairs"]) == [field.replace("_", " ")]


def test_1_and_its_text_refer_to_each_other(content):
    with_annotations(content, image_id=lambda i: str(i % 3 + 1))
    clean = clean_coco(content)
    assert clean["info"]["repairs"]["reference"] == [8, "annotations[0]: image_id '1'"]
    assert [a["image_id"] for a in clean["annotations"]] == [i % 3 + 1 for i in range(8)]


def test_ignored_objects_become_difficult_ones(content):
    content["annotations"][0]["ignore"] = 1
    content["annotations"][1].update(ignore=1, iscrowd=1)
    clean = clean_coco(content)
    assert clean["annotations"][0]["difficult"] == 1
    assert "difficult" not in clean["annotations"][1]
    assert "difficult" not in clean["annotations"][2]
    assert clean["info"]["repairs"]["ignore"][0] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][2].update(bbox=[1, 2, 3]), "annotations[2]: bbox must be 4"),
        (lambda c: c["annotations"][2].update(bbox=["1", 2, 3, 4]), "annotations[2]: bbox must be"),
        (lambda c: c["annotations"][2].update(bbox=None), "annotations[2]: bbox must be 4"),
        (lambda c: c["annotations"][2].pop("bbox"), "annotations[2] has no 'bbox'"),
        (lambda c: c["annotations"][2].update(iscrowd=[]), "annotations[2]: iscrowd must be 0 or"),
        (lambda c: c["annotations"][2].update(iscrowd=2), "annotations[2]: iscrowd must be 0 or"),
        (lambda c: c["annotations"][2].update(image_id=None), "image_id must be a whole number or"),
        (lambda c: c["annotations"].insert(0, None), "annotations[0] has no"),
        (lambda c: c["images"][1].update(id=1), "images[0] and [1] have the same id 1"),
        (lambda c: c["categories"][1].update(id=9), "categories[0] and [1] have the same id 9"),
        (lambda c: c["images"][1].update(width=0), "images[1]: the size is 0 x 80"),
        (lambda c: c["images"][1].update(height=math.nan), "images[1]: the size is 100 x nan"),
        (lambda c: c["images"][1].update(width=10**400), "images[1]: the size is a number of"),
        (lambda c: c["images"][1].update(file_name=""), "images[1]: file_name is ''"),
        (lambda c: c["images"][1].update(file_name=7), "images[1]: file_name must be a text"),
        (lambda c: c["images"].clear(), "the list 'images' is empty"),
        (lambda c: c["categories"].clear(), "the list 'categories' is empty"),
        (lambda c: c.pop("annotations"), "no list 'annotations'"),
    ],
)
def test_what_cant_be_understood_is_refused_with_its_place(content, tmp_path, change, message):
    change(content)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        read_coco_json(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path))


@pytest.mark.parametrize(
    ("other", "hint"),
    [
        ([{"image_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}], "these are detections"),
        ({"shapes": [], "imagePath": "1.png"}, "convert_dataset.py labelme FOLDER"),
        ([{"data": {}, "annotations": []}], "Label Studio"),
        ({"_via_img_metadata": {}}, "convert_dataset.py via FILE"),
        ({"a.jpg12": {"filename": "a.jpg", "regions": []}}, "convert_dataset.py via FILE"),
        ({"categories": {}, "items": []}, "Datumaro"),
        ([], ""),
        (3, ""),
    ],
)
def test_other_formats_are_recognised(other, hint):
    with pytest.raises(UserError, match="not in COCO format: it has no list 'images'") as caught:
        clean_coco(other)
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    "encode",
    [
        lambda t: t.encode(),
        lambda t: codecs.BOM_UTF8 + t.encode(),
        lambda t: t.encode("utf-16"),
        lambda t: t.encode("utf-16-le"),
        lambda t: gzip.compress(t.encode()),
    ],
)
def test_encodings(content, tmp_path, encode):
    content["categories"][0]["name"] = "zażółć"
    path = tmp_path / "a.json"
    path.write_bytes(encode(json.dumps(content, ensure_ascii=False)))
    assert "zażółć" in [c["name"] for c in read_coco_json(str(path))["categories"]]


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe\x00", b"\x1f\x8b broken", gzip.compress(b"{}" * 999, mtime=0)[:20],
     b"[" * 100_000, b"1" * 5000, b"\x00" * 50],
)  # fmt: skip
def test_broken_files_are_one_line(tmp_path, data):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        load_json(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def register(content, tmp_path):
    """The content registered as "own", with images of its sizes; the config that uses it."""
    for image in content["images"]:
        path = tmp_path / "images" / image["file_name"].replace("\\", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (int(image["width"]), int(image["height"]))).save(path)
    file = tmp_path / "own.json"
    file.write_text(json.dumps(content))
    forget_own_data()
    register_coco_json("own", str(file), str(tmp_path / "images"))
    return load_config(CONFIG, [
        "DATASETS.COCO_JSON", repr((("own", str(file), str(tmp_path / "images")),)),
        "DATASETS.TRAIN", "('own',)", "DATASETS.TEST", "('own',)",
        "MODEL.RETINANET.NUM_CLASSES", str(len(content["categories"])),
    ])  # fmt: skip


def shifted(bbox):
    """A detection near an object: by 0, 4 or 8 pixels to the right."""
    x, y, *extent = bbox
    return [x + 4 * (y % 3), y, *extent]


def ap_of(name, detect=list):
    """AP, by our evaluator, of the data set's own boxes after ``detect``."""
    evaluator = BoxEvaluator(name)
    evaluator.reset()
    for d in DatasetCatalog.get(name):
        found = Instances((d["height"], d["width"]))
        boxes = [detect(a["bbox"]) for a in d["annotations"]]
        boxes = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        found.pred_boxes = Boxes(boxes.float())
        found.scores = 0.9 - boxes[:, 0].float() / 1000
        found.pred_classes = torch.tensor([a["category_id"] for a in d["annotations"]]).long()
        evaluator.process([d], [{"instances": found}])
    return evaluator.evaluate()["bbox"]["AP"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"id": lambda i: f"box-{i}"},
        {"id": lambda i: i if i % 2 else f"box-{i}"},
        {"id": lambda i: -i},
        {"id": lambda i: 2**64 + i},
        {"id": ...},
        {"area": None},
        {"area": "x"},
        {"iscrowd": None},
        {"iscrowd": "0"},
        {"segmentation": [[1, 2, 3, 4]]},
        {"segmentation": {"size": [80, 100], "counts": "broken"}},
    ],
)
def test_ap_is_right_whatever_the_habit(content, tmp_path, fields):
    cfg = register(with_annotations(content, **fields), tmp_path)
    check_datasets(cfg, training=True, read_images=True)
    assert ap_of("own") == pytest.approx(100.0)
    assert sum(len(d["annotations"]) for d in load_training_dicts(cfg)) == 8


def test_ap_equals_pycocotools_on_the_clean_file(content, tmp_path):
    register(content, tmp_path)
    prepare_dataset("own")
    coco = COCO(MetadataCatalog.get("own").json_file)
    boxes = [shifted(a["bbox"]) for a in content["annotations"]]
    detections = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": box,
         "score": 0.9 - box[0] / 1000}
        for a, box in zip(content["annotations"], boxes, strict=True)
    ]  # fmt: skip
    evaluation = COCOeval(coco, coco.loadRes(detections), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert 30 < evaluation.stats[0] * 100 < 90
    assert evaluation.stats[0] * 100 == pytest.approx(ap_of("own", shifted))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("class twice", lambda c: c["categories"][0].update(name="a")),
        ("file twice", lambda c: c["images"][0].update(file_name="2.png")),
        ("only crowds", lambda c: with_annotations(c, iscrowd=1)),
        ("normalised", lambda c: with_annotations(c, bbox=lambda i: [0.1, 0.2, 0.3, 0.05 * i])),
        (
            "corners",
            lambda c: with_annotations(c, bbox=lambda i: [40 + i, 30 + i, 70 + 2 * i, 60 + i]),
        ),
        ("unknown category", lambda c: c["annotations"][0].update(category_id="dog")),
    ],
)
def test_what_spoils_a_training_is_refused(content, tmp_path, kind, change):
    change(content)
    cfg = register(content, tmp_path)
    with pytest.raises(UserError) as caught:
        check_datasets(cfg, training=True)
    assert f"{tmp_path / 'own.json'}: " in str(caught.value)
    assert kind in str(caught.value)


@pytest.mark.parametrize(
    "value", [math.nan, -math.inf, 1e200, 10**400], ids=["nan", "-inf", "1e200", "int"]
)
def test_boxes_that_are_not_finite_are_named_and_left_out_everywhere(
    content, tmp_path, caplog, value
):
    content["annotations"][1]["bbox"][2] = value
    cfg = register(content, tmp_path)
    check_datasets(cfg, training=True)
    assert f"data set 'own': {tmp_path / 'own.json'}: 1 x not finite: annotations[1] (id 2): " in (
        caplog.text
    )
    assert sum(len(d["annotations"]) for d in load_training_dicts(cfg)) == 7
    assert ap_of("own") == pytest.approx(100.0)
    assert caplog.text.count("x not finite") == 1, "told once, not at each evaluation"


def test_images_to_judge_by_need_objects(content, tmp_path, caplog):
    for i, name in enumerate(("own", "other_empty")):
        entry = {**content, "annotations": content["annotations"] if i == 0 else []}
        (tmp_path / f"{name}.json").write_text(json.dumps(entry))
    cfg = register(content, tmp_path)
    file = str(tmp_path / "other_empty.json")
    cfg.DATASETS.COCO_JSON += (("other_empty", file, str(tmp_path / "images")),)
    cfg.DATASETS.TRAIN = ("own", "other_empty")
    check_datasets(cfg, training=True)
    cfg.DATASETS.TEST = ("other_empty",)
    message = "DATASETS.TEST 'other_empty': no image has a usable box"
    with pytest.raises(UserError, match=message):
        check_datasets(cfg, training=True)
    # Detections of images that nobody has annotated: alone, or beside a set to judge by.
    for training, names in ((False, ("other_empty",)), (True, ("own", "other_empty"))):
        cfg.DATASETS.TEST = names
        caplog.clear()
        check_datasets(cfg, training=training)
        assert message in caplog.text


def test_missing_images_are_named_before_training(content, tmp_path):
    cfg = register(content, tmp_path)
    (tmp_path / "images/2.png").unlink()
    content = read_coco_json(str(tmp_path / "own.json"))
    assert missing_images(content, str(tmp_path / "images")) == [str(tmp_path / "images/2.png")]
    with pytest.raises(UserError, match=r"1 x missing image: .*2\.png"):
        check_datasets(cfg, training=True)


def save_exif(path, size, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(path, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("turned", [False, True])
def test_exif_rotation(content, tmp_path, orientation, turned):
    """The size that counts is the one after the turn, as detectron2 reads the image."""
    content["images"] = content["images"][:1]
    with_annotations(content, image_id=1)
    register(content, tmp_path)
    size = (80, 100) if turned else (100, 80)
    save_exif(tmp_path / "images/1.png", size, orientation)
    report = inspect_images(clean_coco(content), str(tmp_path / "images"))
    right = turned == (orientation >= 5)
    assert (report.problems == {}) == right
    assert report.rotated == (orientation >= 5)
    loaded = load_training_dicts_and_map(tmp_path, content)
    assert (loaded is None) != right


def load_training_dicts_and_map(tmp_path, content):
    """What detectron2's mapper makes of the first image; None where it refuses its size."""
    from detectron2.data.detection_utils import SizeMismatchError, check_image_size, read_image

    image = read_image(str(tmp_path / "images/1.png"), "BGR")
    try:
        check_image_size({"file_name": "1.png", **content["images"][0]}, image)
    except SizeMismatchError:
        return None
    return image


@pytest.mark.parametrize(("mode", "kind"), [("I;16", "PNG"), ("I", "TIFF"), ("F", "TIFF")])
def test_images_of_more_than_8_bit_are_named(content, tmp_path, mode, kind):
    cfg = register(content, tmp_path)
    Image.new(mode, (100, 80)).save(tmp_path / "images/1.png", format=kind)
    with pytest.raises(UserError, match=r"1 x not 8 bit: .*1\.png"):
        check_datasets(cfg, training=True, read_images=True)


def test_backslashes_in_file_names(content, tmp_path):
    content["images"][0]["file_name"] = "deep\\1.png"
    cfg = register(content, tmp_path)
    check_datasets(cfg, training=True, read_images=True)


NUMBERS = st.one_of(st.integers(-10, 200), st.floats(-50, 200), st.just(math.nan), st.just(10**400))
VALUES = st.one_of(NUMBERS, st.none(), st.booleans(), st.text(max_size=3), st.just([]), st.just({}))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_content_is_cleaned_or_refused(data):
    """Never another error; and what is clean has only what the next reader can take."""
    field = st.sampled_from(["id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore"])
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 64, "height": data.draw(NUMBERS)}
            for i in data.draw(st.lists(VALUES.filter(lambda v: not isinstance(v, (dict, list)))))
        ],
        "annotations": [
            {"image_id": 0, "category_id": 1, "bbox": data.draw(st.lists(NUMBERS, max_size=5)),
             **data.draw(st.dictionaries(field, VALUES))}
            for _ in range(data.draw(st.integers(0, 4)))
        ],
        "categories": [{"id": i, "name": "a"} for i in data.draw(st.lists(VALUES, max_size=2))],
    }  # fmt: skip
    try:
        clean = clean_coco(content)
    except UserError:
        return
    inspect_annotations(clean)
    assert clean_coco(json.loads(json.dumps(clean)))["images"] == clean["images"]
    for annotation in clean["annotations"]:
        assert annotation["iscrowd"] in (0, 1)
        assert math.isfinite(annotation["area"])
        assert len(annotation["bbox"]) == 4

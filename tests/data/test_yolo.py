"""Data sets of YOLO's layout, against boxes worked out by hand."""

import json
from datetime import date
from pathlib import Path

import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from iou_balanced_d2.data import check_datasets, prepare_dataset, register_yolo_folder
from iou_balanced_d2.data.loading import load_training_dicts
from iou_balanced_d2.engine import load_config
from iou_balanced_d2.errors import UserError
from iou_balanced_d2.model_zoo import get_config_file

from ..command import forget_own_data
from .test_coco_format import ap_of

CONFIG = get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
A = "labels/train/a.txt"


def write(folder, **changes):
    """Two training images of 100 x 50, with a box and a polygon; one for validation, empty."""
    for split, names in (("train", ("a", "b")), ("val", ("c",))):
        for name in names:
            path = folder / f"images/{split}/{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (100, 50)).save(path)
    labels = folder / "labels/train"
    labels.mkdir(parents=True, exist_ok=True)
    (labels / "a.txt").write_text("1 0.5 0.5 0.2 0.4\n\n0 0.1 0.2 0.3 0.2 0.3 0.6 0.1 0.8\n")
    (labels / "b.txt").write_text("")
    content = {"train": "images/train", "val": "images/val", "names": ["cat", "dog"], **changes}
    (folder / "data.yaml").write_text(yaml.safe_dump(content))
    return folder


def content_of(folder, split="train"):
    forget_own_data()
    register_yolo_folder("own", str(folder), split)
    prepare_dataset("own")
    return json.loads(Path(MetadataCatalog.get("own").json_file).read_text())


def test_boxes_and_polygons_by_hand(tmp_path):
    content = content_of(write(tmp_path))
    assert [c["name"] for c in content["categories"]] == ["cat", "dog"]
    assert [i["file_name"] for i in content["images"]] == [
        "images/train/a.png", "images/train/b.png",
    ]  # fmt: skip
    box, polygon = content["annotations"]
    assert (box["category_id"], polygon["category_id"]) == (2, 1)
    assert box["bbox"] == pytest.approx([40, 15, 20, 20])
    assert polygon["bbox"] == pytest.approx([10, 10, 20, 30])


def test_keypoints_are_left_out(tmp_path):
    folder = write(tmp_path, kpt_shape=[2, 3])
    (folder / A).write_text("1 0.5 0.5 0.2 0.4 0.1 0.1 2 0.9 0.9 2\n")
    (box,) = content_of(folder)["annotations"]
    assert box["bbox"] == pytest.approx([40, 15, 20, 20])


def test_images_without_a_label_file_have_no_objects(tmp_path):
    content = content_of(write(tmp_path), "val")
    assert len(content["images"]) == 1
    assert content["annotations"] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"names": {0: "cat", 1: "dog"}},
        {"names": {"0": "cat", "1": "dog"}, "nc": 2},
        {"train": ["images/train"]},
        {"train": "../images/train"},
        {"train": "list.txt"},
        {"path": "."},
        {"path": "elsewhere"},
    ],
)
def test_ways_to_write_data_yaml(tmp_path, changes):
    expected = content_of(write(tmp_path))
    (tmp_path / "list.txt").write_text("./images/train/b.png\nimages/train/a.png\n")
    assert content_of(write(tmp_path, **changes)) == expected


def test_class_names_may_be_whole_numbers(tmp_path):
    content = content_of(write(tmp_path, names=[0, 1]))
    assert [c["name"] for c in content["categories"]] == ["0", "1"]


def test_hidden_folders_hold_no_photos(tmp_path):
    expected = content_of(write(tmp_path / ".hidden/set"))
    copies = tmp_path / ".hidden/set/images/train/.ipynb_checkpoints/deep"
    copies.mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(copies / "a-checkpoint.png")
    assert content_of(tmp_path / ".hidden/set") == expected


def test_the_folder_called_images_last_is_the_one(tmp_path):
    folder = write(tmp_path / "images" / "deep")
    assert len(content_of(folder)["annotations"]) == 2


def test_a_turned_photo(tmp_path):
    write(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (50, 100)).save(tmp_path / "images/train/a.png", exif=exif)
    content = content_of(tmp_path)
    assert (content["images"][0]["width"], content["images"][0]["height"]) == (100, 50)
    assert content["annotations"][0]["bbox"] == pytest.approx([40, 15, 20, 20])


def test_a_box_may_stick_out_of_the_image(tmp_path):
    folder = write(tmp_path)
    (folder / A).write_text("1 0.97 0.5 0.1 0.2\n")
    (box,) = content_of(folder)["annotations"]
    assert box["bbox"] == pytest.approx([92, 20, 8, 10])


def test_photos_that_are_resized_are_seen(tmp_path):
    folder = write(tmp_path)
    content_of(folder)
    Image.new("RGB", (50, 25)).save(folder / "images/train/a.png")
    box, _ = content_of(folder)["annotations"]
    assert box["bbox"] == pytest.approx([20, 7.5, 10, 10])


def test_changed_labels_are_seen(tmp_path):
    content_of(write(tmp_path))
    (tmp_path / "labels/train/b.txt").write_text("0 0.5 0.5 1 1")
    assert len(content_of(tmp_path)["annotations"]) == 3


BROKEN = {
    "no data.yaml": (lambda f: (f / "data.yaml").unlink(), "data.yaml: can't be read"),
    "no YAML": (lambda f: (f / "data.yaml").write_text("a: ["), "data.yaml: not a YAML file"),
    "a list": (lambda f: (f / "data.yaml").write_text("[1]"), "not YOLO's data.yaml"),
    "no names": (lambda f: write(f, names=None), "names must be a list"),
    "names with a gap": (lambda f: write(f, names={0: "a", 2: "b"}), "names must be a list"),
    "nc": (lambda f: write(f, nc=3), "nc is 3, but names has 2 classes"),
    "no split": (lambda f: write(f, train=None), "has no split 'train'; it has val"),
    "no folder": (lambda f: write(f, train="gone"), "'gone' not found"),
    "no image": (lambda f: (f / "e").mkdir() or write(f, train="e"), "has no image in 'e'"),
    "a text": (lambda f: (f / A).write_text("dog 0 0 1 1"), "a.txt, line 1: must be numbers"),
    "class": (lambda f: (f / A).write_text("2 .5 .5 1 1"), "class must be 0 to 1, got 2"),
    "a number for a folder": (
        lambda f: write(f, train=5),
        "train must be a folder or several, got 5",
    ),
    "pixels": (lambda f: (f / A).write_text("1 50 20 9 9"), "in shares of the image"),
    "predictions": (lambda f: (f / A).write_text("1 .5 .5 .1 .1 .9"), "6 numbers, as predictions"),
    "a truth value": (lambda f: write(f, names=[False, "b"]), "names has False, which is no text"),
    "a date": (lambda f: write(f, names={0: date(2020, 1, 2)}), "in quotes"),
    "kpt_shape": (lambda f: write(f, kpt_shape=17), "kpt_shape must be two whole numbers"),
    "3 numbers": (lambda f: (f / A).write_text("1 .5 .5"), "a class and a box or polygon"),
    "bad image": (
        lambda f: (f / "images/train/a.png").write_text("no"),
        "images/train/a.png: can't be read",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_input_is_one_line(tmp_path, case):
    change, expected = BROKEN[case]
    write(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError) as caught:
        content_of(tmp_path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def config_of(folder, test="train"):
    forget_own_data()
    DatasetCatalog.pop("own_test", None)
    MetadataCatalog.pop("own_test", None)
    file = str(folder / "data.yaml")
    return load_config(CONFIG, [
        "DATASETS.YOLO_FOLDER", repr((("own", file, "train"), ("own_test", file, test))),
        "DATASETS.TRAIN", "('own',)", "DATASETS.TEST", "('own_test',)",
        "MODEL.RETINANET.NUM_CLASSES", "2",
    ])  # fmt: skip


def test_from_the_config(tmp_path):
    cfg = config_of(write(tmp_path))
    check_datasets(cfg, training=True, read_images=True)
    assert [len(d["annotations"]) for d in DatasetCatalog.get("own")] == [2, 0]


def test_a_split_to_judge_by_needs_objects(tmp_path):
    cfg = config_of(write(tmp_path), "val")
    label = r"none of its images has a label file, such as .*labels/val/c\.txt"
    with pytest.raises(UserError, match=rf"'own_test': no image has a usable box.*{label}"):
        check_datasets(cfg, training=True)
    (tmp_path / "labels/val").mkdir()
    (tmp_path / "labels/val/c.txt").write_text("")
    with pytest.raises(UserError, match="'own_test': no image has a usable box") as caught:
        check_datasets(cfg, training=True)
    assert "label file" not in str(caught.value)


def test_boxes_that_are_not_finite_are_left_out(tmp_path, caplog):
    (write(tmp_path) / A).write_text("1 nan .5 .2 .4\n0 .5 .5 .2 .4\n")
    cfg = config_of(tmp_path)
    check_datasets(cfg, training=True)
    assert "data.yaml: 1 x not finite: " in caplog.text
    assert "images/train/a.png" in caplog.text
    assert sum(len(d["annotations"]) for d in load_training_dicts(cfg)) == 1
    assert ap_of("own_test") == pytest.approx(100.0)

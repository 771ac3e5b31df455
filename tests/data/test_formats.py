"""Other formats than the one expected are answered with what reads them."""

import pytest

from iou_balanced_d2.data.coco_format import read_coco_json
from iou_balanced_d2.data.voc import VocSource
from iou_balanced_d2.data.yolo import YoloSource
from iou_balanced_d2.errors import UserError


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("<?xml version='1.0'?><annotations><meta/></annotations>", "convert_dataset.py cvat FILE"),
        ("<annotation><folder/></annotation>", "convert_dataset.py voc FOLDER"),
        ("a,b,c", ""),
    ],
)
def test_other_files_than_json_are_recognised(tmp_path, text, hint):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="not a JSON file") as caught:
        read_coco_json(str(tmp_path / "a.json"))
    assert hint in str(caught.value)


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["data.yaml", "images"], "DATASETS.YOLO_FOLDER"),
        (["Annotations", "ImageSets", "JPEGImages"], "DATASETS.VOC_FOLDER"),
        (["a.jpg", "a.xml"], "convert_dataset.py voc FOLDER"),
        (["train.json", "._train.json"], "such as train.json"),
        ([], "Is a directory"),
    ],
)
def test_a_folder_in_place_of_the_file_is_recognised(tmp_path, names, hint):
    for name in names:
        (tmp_path / name).mkdir()
    with pytest.raises(UserError) as caught:
        read_coco_json(str(tmp_path))
    assert hint in str(caught.value)


def test_layouts_taken_for_each_other_are_recognised(tmp_path):
    (tmp_path / "data.yaml").write_text("names: [cat]")
    with pytest.raises(UserError, match=r"VOC's layout is .* \(a data set of YOLO's layout"):
        VocSource(str(tmp_path), (("", "train"),), None).fingerprint()
    (tmp_path / "data.yaml").unlink()
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "ImageSets").mkdir()
    with pytest.raises(UserError, match=r"can't be read: .* \(a data set of VOC's layout"):
        YoloSource(str(tmp_path / "data.yaml"), "train").fingerprint()

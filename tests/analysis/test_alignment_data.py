"""Detections of any framework, and what is wrong with some of them."""

import json

import numpy as np
import pytest

from iou_balanced_d2.analysis.alignment_data import read_detections, read_ground_truth
from iou_balanced_d2.errors import UserError

IMAGES = [{"id": i, "file_name": f"{i}.png", "height": 99, "width": 99} for i in (7, 3, 5)]
CATEGORIES = [{"id": 90, "name": "zebra"}, {"id": 2, "name": "cat"}]


def object_of(image, category, box, **fields):
    return {"image_id": image, "category_id": category, "bbox": box, **fields}


def detection(image=3, category=90, box=(1, 2, 3, 4), score=0.5):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


@pytest.fixture
def read(tmp_path):
    """Read a list of detections on three images with two categories."""
    annotations = [
        object_of(3, 90, [1, 2, 10, 20]),
        object_of(7, 2, [0, 0, 5, 5], iscrowd=1),
        object_of(7, 2, [0, 0, 6, 6], difficult=1),
        object_of(7, 2, [0, 0, 7, 7]),
    ]
    content = {"images": IMAGES, "annotations": annotations, "categories": CATEGORIES}
    (tmp_path / "gt.json").write_text(json.dumps(content))
    ground_truth = read_ground_truth(str(tmp_path / "gt.json"))

    def run(rows):
        (tmp_path / "dets.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
        return ground_truth, read_detections(str(tmp_path / "dets.json"), ground_truth)

    return run


def test_rows_are_sorted_by_class_image_and_score(read):
    rows = [detection(5, 90), detection(3, 90, score=0.1), detection(3, 90, score=0.9),
            detection(7, 2), detection(3, 90, (5, 5, 1, 1), score=0.9)]  # fmt: skip
    ground_truth, found = read(rows)
    assert ground_truth.classes == ["cat", "zebra"]
    assert ground_truth.num_objects().tolist() == [1, 1]
    np.testing.assert_array_equal(ground_truth.boxes[:, 2], [5, 6, 7, 11])
    assert ground_truth.crowd.tolist() == [True, False, False, False]
    assert ground_truth.ignored.tolist() == [True, True, False, False]
    assert found.label.tolist() == [0, 1, 1, 1, 1]
    assert [IMAGES[i]["id"] for i in found.image] == [7, 3, 3, 3, 5]
    assert found.scores.tolist() == [0.5, 0.9, 0.9, 0.1, 0.5]
    assert found.boxes[1:3, 0].tolist() == [1, 5], "equal scores stay in the file's order"
    assert found.rank.tolist() == [0, 0, 1, 2, 0]


def test_whole_numbers_may_be_written_as_floats(read):
    _, found = read([detection(3.0, 90.0)])
    assert (found.label.tolist(), found.image.tolist()) == ([1], [1])


def test_a_hundred_detections_of_an_image_and_class_count(read):
    rows = [detection(score=i / 1000) for i in range(150)] + [detection(7, 2)]
    _, found = read(rows)
    assert len(found) == 101
    assert found.scores[1:].min() == 0.05


def test_nothing_found_is_no_error(read):
    _, found = read([])
    assert len(found) == 0
    assert found.boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("{", "not a JSON file"),
        ({"annotations": []}, "not a list of detections"),
        ([{"image_id": 3}], "detection 0 has no 'bbox'"),
        ([3], "detection 0 has no 'bbox'"),
        ([detection(), detection(4)], r"detection\[1\]: image_id 4 is not among .* \(which are 7"),
        ([detection("3")], "image_id '3' is not among"),
        ([detection([3])], r"image_id \[3\] is not among"),
        ([detection(category=1)], r"category_id 1 is not among .*categories \(which are 2, 90\)"),
        ([detection(score=1.5)], "detection 0: score 1.5 is not a number between 0 and 1"),
        ([detection(score="high")], "score 'high' is not a number"),
        ([detection(score=float("nan"))], "score nan is not a number"),
        ([detection(box=(1, 2, 3))], "bbox must be 4 finite numbers"),
        ([detection(box=(1, 2, 3, float("inf")))], "bbox must be 4 finite numbers"),
    ],
)
def test_what_is_wrong_is_named(read, rows, message):
    with pytest.raises(UserError, match=message):
        read(rows)


def test_a_missing_file_is_named(read, tmp_path):
    ground_truth, _ = read([])
    with pytest.raises(UserError, match=r"nowhere\.json: can't be read: No such file"):
        read_detections(str(tmp_path / "nowhere.json"), ground_truth)


def test_annotations_of_an_unknown_image_are_named(tmp_path):
    content = {"images": IMAGES, "categories": CATEGORIES}
    content["annotations"] = [object_of(8, 2, [0, 0, 5, 5])]
    (tmp_path / "gt.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"gt.json: annotations\[0\]: image_id 8 is not among"):
        read_ground_truth(str(tmp_path / "gt.json"))

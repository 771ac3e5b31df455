"""Detections of any framework, and what is wrong with some of them."""

import json

import numpy as np
import pytest

from iou_balanced_d2.errors import UserError
from iou_balanced_d2.evaluation.detections import read_detections, read_ground_truth
from iou_balanced_d2.evaluation.matching import num_objects

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

    def run(rows, **kwargs):
        (tmp_path / "dets.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
        return ground_truth, read_detections(str(tmp_path / "dets.json"), ground_truth, **kwargs)

    return run


def test_rows_are_sorted_by_class_image_and_score(read):
    rows = [detection(5, 90), detection(3, 90, score=0.1), detection(3, 90, score=0.9),
            detection(7, 2), detection(3, 90, (5, 5, 1, 1), score=0.9)]  # fmt: skip
    ground_truth, found = read(rows)
    assert ground_truth.classes == ["cat", "zebra"]
    assert num_objects(ground_truth).tolist() == [1, 1]
    np.testing.assert_array_equal(ground_truth.boxes[:, 2], [5, 6, 7, 11])
    assert ground_truth.crowd.tolist() == [True, False, False, False]
    assert ground_truth.ignored.tolist() == [True, True, False, False]
    assert found.label.tolist() == [0, 1, 1, 1, 1]
    assert [ground_truth.images[i]["id"] for i in found.image] == [7, 3, 3, 3, 5]
    assert found.scores.tolist() == [0.5, 0.9, 0.9, 0.1, 0.5]
    assert found.boxes[1:3, 0].tolist() == [1, 5], "equal scores stay in the file's order"
    assert found.rank.tolist() == [0, 0, 1, 2, 0]


def test_whole_numbers_may_be_written_as_floats(read):
    _, found = read([detection(3.0, 90.0)])
    assert (found.label.tolist(), found.image.tolist()) == ([1], [0])


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
        ("{", "dets.json: not a JSON file"),
        ("[" * 100_000, "nested too deeply"),
        ({"annotations": []}, "not a list of detections"),
        ("null", "not a list of detections"),
        ([{"image_id": 3}], r"detections\[0\] has no 'bbox'"),
        ([3], r"detections\[0\] has no 'bbox'"),
        ([detection(), [detection()]], r"detections\[1\] has no 'bbox'"),
        ([detection(), detection(4)], r"detections\[1\]: image_id 4 is not among .* \(which are 3"),
        ([detection("3")], "image_id '3' is not among"),
        ([detection([3])], r"image_id \[3\] is not among"),
        ([detection(None)], "image_id None is not among"),
        ([detection(2**64)], "image_id 18446744073709551616 is not among"),
        ([detection(category=1)], r"category_id 1 is not among .*categories \(which are 2, 90\)"),
        ([detection(category=True)], "category_id True is not among"),
        ([detection(score="high")], r"detections\[0\]: score 'high' is not a finite number"),
        ([detection(score=None)], "score None is not a finite number"),
        ([detection(score=[0.5])], r"score \[0.5\] is not a finite number"),
        ([detection(score=True)], "score True is not a finite number"),
        ([detection(score=float("nan"))], "score nan is not a finite number"),
        ([detection(score=10**400)], "score 1000+ is not a finite number"),
        ([detection(box=(1, 2, 3))], r"detections\[0\]: bbox must be 4 finite numbers"),
        ([detection(box="1234")], "bbox must be 4 finite numbers"),
        ([detection(box=(1, 2, 3, None))], "bbox must be 4 finite numbers"),
        ([detection(box=(1, 2, 3, [4]))], "bbox must be 4 finite numbers"),
        ([detection(box=(1, 2, 3, float("nan")))], "bbox must be 4 finite numbers"),
        ([detection(box=(1, 2, 3, float("inf")))], "bbox must be 4 finite numbers"),
        ([detection(box=(1, 2, 1e200, 1e200))], "bbox must be 4 finite numbers"),
    ],
)
def test_what_is_wrong_is_named(read, rows, message):
    with pytest.raises(UserError, match=message) as error:
        read(rows)
    assert "\n" not in str(error.value)


def test_scores_that_must_be_probabilities(read):
    rows = [detection(), detection(score=1.5)]
    assert read(rows)[1].scores.tolist() == [1.5, 0.5]
    with pytest.raises(UserError, match=r"detections\[1\]: score 1.5 is not between 0 and 1"):
        read(rows, probabilities=True)


def test_a_missing_file_is_named(read, tmp_path):
    ground_truth, _ = read([])
    with pytest.raises(UserError, match=r"nowhere\.json: can't be read: No such file"):
        read_detections(str(tmp_path / "nowhere.json"), ground_truth)


def read_objects(tmp_path, *annotations, images=IMAGES, categories=CATEGORIES, difficult="ignore"):
    content = {"images": images, "categories": categories, "annotations": annotations}
    (tmp_path / "gt.json").write_text(json.dumps(content))
    return read_ground_truth(str(tmp_path / "gt.json"), difficult)


def test_ids_of_any_kind_are_renumbered(tmp_path):
    """Numbers before texts; those of annotations don't matter, nor that they are missing."""
    images = [{**IMAGES[0], "id": i} for i in ("b", 2**70, -1, "a")]
    categories = [{"id": i, "name": str(i)} for i in (2**64, "x", 0)]
    objects = [object_of("a", "x", [0, 0, 1, 1], id="7"), object_of(2**70, 2**64, [0, 0, 2, 2]),
               object_of(-1, 0, [0, 0, 3, 3], id=-5), object_of("b", 0, [0, 0, 4, 4], id=2**64),
               object_of("b", 0, [0, 0, 5, 5], id=-5)]  # fmt: skip
    ground_truth = read_objects(tmp_path, *objects, images=images, categories=categories)
    assert [image["original_id"] for image in ground_truth.images] == [-1, 2**70, "a", "b"]
    assert ground_truth.classes == ["0", str(2**64), "x"]
    assert ground_truth.group.tolist() == [0, 3, 3, 4 + 1, 8 + 2]
    assert ground_truth.boxes[:, 2].tolist() == [3, 4, 5, 2, 1]


def test_an_area_that_is_missing_is_the_boxes(tmp_path):
    areas = [7.5, None, float("nan"), float("inf"), "large"]
    objects = [object_of(3, 2, [0, 0, 4, 5], area=a) for a in areas]
    objects.append(object_of(3, 2, [0, 0, 4, 5]))
    assert read_objects(tmp_path, *objects).areas.tolist() == [7.5, *[20] * 5]


def test_policies_of_difficult_objects(tmp_path):
    objects = [object_of(3, 2, [0, 0, 4, 5], difficult=d, iscrowd=None) for d in (1, 0, True)]
    found = {p: read_objects(tmp_path, *objects, difficult=p) for p in ("ignore", "count", "drop")}
    assert {p: num_objects(g).tolist() for p, g in found.items()} == {
        "ignore": [1, 0], "count": [3, 0], "drop": [1, 0]
    }  # fmt: skip
    assert {p: len(g.boxes) for p, g in found.items()} == {"ignore": 3, "count": 3, "drop": 1}
    with pytest.raises(UserError, match="VOC_DIFFICULT must be one of"):
        read_objects(tmp_path, difficult="skip")


def test_objects_whose_box_is_not_finite_are_left_out(tmp_path, caplog):
    objects = [object_of(3, 2, [0, 0, 5, v]) for v in (5, float("nan"), float("inf"), 1e200)]
    assert read_objects(tmp_path, *objects).boxes.tolist() == [[0, 0, 5, 5]]
    assert "gt.json: 3 x not finite, left out: annotations[1] (id None): box" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"category_id": 8}, r"gt.json: annotations\[0\] .*: category_id 8 is not among"),
        ({"bbox": [0, 0, 5]}, r"annotations\[0\]: bbox must be 4 numbers"),
        ({"iscrowd": "7"}, r"annotations\[0\]: iscrowd must be 0 or 1, got '7'"),
    ],
)
def test_what_is_wrong_with_an_annotation_is_named(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        read_objects(tmp_path, {**object_of(3, 2, [0, 0, 5, 5]), **fields})

"""VOC's AP against cases worked out by hand, and against detectron2's copy of the devkit."""

import numpy as np
import pytest
from detectron2.evaluation.pascal_voc_evaluation import parse_rec, voc_ap, voc_eval
from hypothesis import given
from hypothesis import strategies as st

from iou_balanced_d2.evaluation import voc_average_precision
from iou_balanced_d2.evaluation.voc import _ap, voc_metrics

from .synthetic import arrays_of, coco_of, detections_of, random_case

BOX, FAR = (0, 0, 100, 100), (150, 150, 100, 100)


def voc_ap_of(coco, detections, **kwargs):
    return voc_average_precision(*arrays_of(coco, detections, limit=None), **kwargs)


def ap_of(annotations, rows, thresholds=(0.5,), difficult="ignore", **kwargs):
    """(11 points, area) of the first class at the first threshold."""
    coco = coco_of(annotations, **kwargs)
    arrays = arrays_of(coco, detections_of(rows), difficult, limit=None)
    ap = voc_average_precision(*arrays, iou_thresholds=thresholds)
    return ap.eleven_point[0, 0], ap.area[0, 0]


def test_one_of_two_found():
    """Precision 1 up to recall 1/2: at the points 0, .1, ... .5."""
    objects = [(1, 1, BOX, {}), (1, 1, FAR, {})]
    assert ap_of(objects, [(1, 1, BOX, 0.9)]) == pytest.approx((6 / 11, 1 / 2))


def test_a_wrong_one_between_two_right_ones():
    """Precision 1 to recall .5, then 2/3: six points of 1, five of 2/3; half the area each."""
    objects = [(1, 1, BOX, {}), (1, 1, FAR, {})]
    rows = [(1, 1, BOX, 0.9), (1, 1, (0, 150, 50, 50), 0.8), (1, 1, FAR, 0.7)]
    assert ap_of(objects, rows) == pytest.approx(((6 + 10 / 3) / 11, 5 / 6))


def test_a_wrong_one_first():
    objects = [(1, 1, BOX, {})]
    rows = [(1, 1, FAR, 0.9), (1, 1, BOX, 0.8)]
    assert ap_of(objects, rows) == pytest.approx((1 / 2, 1 / 2))


def test_a_second_detection_is_wrong_even_if_another_object_is_free():
    """COCO would give it the second best object (IoU .6 of 2/3); VOC only looks at the best."""
    objects = [(1, 1, (0, 0, 100, 100), {}), (1, 1, (0, 40, 100, 100), {})]
    rows = [(1, 1, (0, 0, 100, 100), 0.9), (1, 1, (0, 15, 100, 100), 0.8),
            (1, 1, (0, 40, 100, 100), 0.7)]  # fmt: skip
    # The second one's best is the first object (.74 against .6). Precision 1, 1/2, 2/3.
    assert ap_of(objects, rows) == pytest.approx(((6 + 10 / 3) / 11, 5 / 6))


def test_three_tenths_of_the_objects_miss_the_point():
    """In floats 3 * 0.1 is above 0.3; published numbers are so, and the devkit's."""
    objects = [(i, 1, BOX, {}) for i in range(1, 11)]
    rows = [(i, 1, BOX, 0.9) for i in (1, 2, 3)]
    assert ap_of(objects, rows, num_images=10) == pytest.approx((3 / 11, 3 / 10))


@given(data=st.data())
def test_both_kinds_of_ap_against_detectron2(data):
    num_objects = data.draw(st.integers(1, 40))
    right = np.array(data.draw(st.lists(st.booleans(), max_size=60)), bool)
    right &= right.cumsum() <= num_objects
    hits = right.cumsum()
    curve = hits / float(num_objects), hits / np.arange(1, len(right) + 1)
    expected = voc_ap(*curve, use_07_metric=True), voc_ap(*curve)
    assert _ap(right, num_objects) == pytest.approx(expected, abs=1e-12)


def test_an_iou_equal_to_the_threshold_reaches_it():
    rows = [(1, 1, (0, 0, 100, 50), 0.9)]
    assert ap_of([(1, 1, BOX, {})], rows, thresholds=(0.5,)) == (1, 1)
    assert ap_of([(1, 1, BOX, {})], rows, thresholds=(0.51,)) == (0, 0)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("ignore", 1), ("count", (1 / 2 + 1 / 2 * 2 / 3)), ("drop", 1 / 3)],
)
def test_difficult_objects(policy, expected):
    """Two detections of a difficult object, then one of the other object."""
    objects = [(1, 1, BOX, {}), (1, 1, FAR, {"difficult": 1})]
    rows = [(1, 1, FAR, 0.9), (1, 1, (150, 150, 100, 90), 0.8), (1, 1, BOX, 0.7)]
    assert ap_of(objects, rows, difficult=policy)[1] == pytest.approx(expected)


def test_a_difficult_object_counts_by_plain_iou():
    """The detection lies within it, at IoU .4: wrong."""
    objects = [(1, 1, BOX, {}), (1, 1, FAR, {"difficult": 1})]
    rows = [(1, 1, (150, 150, 100, 40), 0.9), (1, 1, BOX, 0.7)]
    assert ap_of(objects, rows)[1] == pytest.approx(1 / 2)


def test_classes_without_objects_are_left_out():
    coco = coco_of([(1, 1, BOX, {}), (1, 3, BOX, {"difficult": 1})], num_classes=3)
    ap = voc_ap_of(coco, detections_of([(1, 1, BOX, 0.9), (1, 2, BOX, 0.9)]))
    assert ap.area.shape == (10, 3)
    np.testing.assert_array_equal(ap.area[0], [1, np.nan, np.nan])
    metrics = voc_metrics(ap, ["class1", "class2", "class3"])
    names = ["AP_11pt", *(f"AP{t}_11pt" for t in range(50, 100, 5))]
    names += [n.replace("11pt", "area") for n in names]
    assert list(metrics)[:22] == names
    assert [metrics[n] for n in names] == pytest.approx([100] * 22)
    assert metrics["AP50_11pt-class1"] == pytest.approx(100)
    assert np.isnan(metrics["AP50_area-class2"])


def test_nothing_found_and_nothing_there():
    assert ap_of([(1, 1, BOX, {})], []) == (0, 0)
    metrics = voc_metrics(voc_ap_of(coco_of([]), []), ["class1"])
    assert np.isnan(list(metrics.values())).all()


@pytest.mark.parametrize("seed", range(3))
def test_against_detectron2(tmp_path, seed):
    """Its voc_eval reads whole pixels from XML and boxes from text: given whole pixels here."""
    coco, detections = random_case(seed, share_difficult=0.2, share_crowd=0, decimals=9)
    for a in (*coco.dataset["annotations"], *detections):
        a["bbox"] = [round(x) for x in a["bbox"]]
    write_voc(tmp_path, coco, detections)
    thresholds = [0.5, 0.61, 0.75]
    ap = voc_ap_of(coco, detections, iou_thresholds=thresholds)
    parse_rec.cache_clear()
    for k in (1, 2, 3):
        for t, threshold in enumerate(thresholds):
            for ours, is_2007 in ((ap.eleven_point, True), (ap.area, False)):
                expected = voc_eval(
                    str(tmp_path / "found_{}.txt"), str(tmp_path / "{}.xml"),
                    str(tmp_path / "images.txt"), f"class{k}", threshold, is_2007,
                )[2]  # fmt: skip
                assert ours[t, k - 1] == pytest.approx(expected, abs=1e-12)
    assert 0.1 < ap.area[0, :3].mean() < 0.9


def write_voc(folder, coco, detections):
    """The case as a VOC tree and as detection files, in pixels from 1, both ends included."""

    def corners(box):
        x, y, w, h = box
        return x + 1, y + 1, x + w, y + h

    for image, objects in coco.imgToAnns.items():
        text = ""
        for o in objects:
            x1, y1, x2, y2 = corners(o["bbox"])
            text += (
                f"<object><name>class{o['category_id']}</name><pose/><truncated>0</truncated>"
                f"<difficult>{o['difficult']}</difficult><bndbox><xmin>{x1}</xmin>"
                f"<ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            )
        (folder / f"{image}.xml").write_text(f"<annotation>{text}</annotation>")
    for image in coco.imgs.keys() - coco.imgToAnns.keys():
        (folder / f"{image}.xml").write_text("<annotation></annotation>")
    (folder / "images.txt").write_text("\n".join(map(str, coco.imgs)))
    for k in range(1, 5):
        lines = [
            f"{d['image_id']} {d['score']!r} {' '.join(map(str, corners(d['bbox'])))}"
            for d in detections
            if d["category_id"] == k
        ]
        (folder / f"found_class{k}.txt").write_text("\n".join(lines))

"""Measures and ceilings: worked out by hand, and against slow recomputations."""

import math
import re

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from iou_balanced_d2.analysis.alignment import analyze
from iou_balanced_d2.analysis.alignment.analysis import verdict
from iou_balanced_d2.analysis.alignment.measures import (
    bins_of,
    calibration,
    correlations,
    outranked_objects,
)
from iou_balanced_d2.analysis.alignment.thresholds import confusion_matrix
from iou_balanced_d2.evaluation.matching import RIGHT, WRONG, find_pairs, match

from ...evaluation.by_pycocotools import metrics_by_pycocotools
from ...evaluation.synthetic import arrays_of, coco_of, detections_of, one_by_one, random_case

SEEDS = range(6)


def analyzed(objects, detections, **kwargs):
    """Results for objects and detections, each (image, class, XYWH box, fields or score)."""
    return analyze(*arrays_of(coco_of(objects, **kwargs), detections_of(detections))).results


def wide(iou):
    """A box whose IoU with [0, 0, 100, 100] is ``iou``."""
    return [0, 0, 100 * iou, 100]


GT = [0, 0, 100, 100]


# ---- AP and ceilings


@pytest.mark.parametrize("seed", SEEDS)
def test_ap_is_that_of_pycocotools(seed):
    coco, rows = random_case(seed, share_difficult=0.1)
    analysis = analyze(*arrays_of(coco, rows))
    expected = metrics_by_pycocotools(coco, rows)
    for name, value in analysis.results["ap"].items():
        assert value == pytest.approx(expected[name], abs=1e-9), name
    for k, result in enumerate(analysis.results["classes"].values()):
        assert result["ap"]["AP"] == pytest.approx(
            expected[f"AP-class{k + 1}"], abs=1e-9, nan_ok=True
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_no_ceiling_is_below_ap(seed):
    results = analyze(*arrays_of(*random_case(seed, decimals=3))).results
    ranked, placed = (results["ceilings"][f"perfect_{x}"] for x in ("ranking", "placing"))
    for name, ap in results["ap"].items():
        assert ranked[name] >= ap
        assert placed[name] >= ap
    assert ranked["AP"] > results["ap"]["AP"] + 1


def test_perfect_ranking_is_pycocotools_ap_with_iou_for_the_score():
    """Duplicates last: the true IoU where a box is the best one of its object, else 0."""
    rng = np.random.default_rng(0)
    # One object a cell of 100 pixels: no box is about two objects.
    objects = [(image, 1, [100 * cell + 10, 10, 70, 70], {}) for image in (1, 2) for cell in (0, 1)]
    rows = [
        (image, 1, (np.array(box) + rng.normal(0, 7, 4)).tolist(), float(rng.random()))
        for image, _, box, _ in objects
        for _ in range(5)
    ]
    coco, found = coco_of(objects, num_images=2), detections_of(rows)
    ranked = analyze(*arrays_of(coco, found)).results["ceilings"]["perfect_ranking"]
    for start in range(0, 20, 5):
        x, y, w, h = objects[start // 5][2]
        truth = torch.tensor([[x, y, x + w, y + h]]).double()
        boxes = torch.tensor([d["bbox"] for d in found[start : start + 5]]).double()
        iou = box_iou(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1), truth)[:, 0]
        for i, d in enumerate(found[start : start + 5]):
            d["score"] = float(iou[i]) if i == iou.argmax() else 0.0
    expected = metrics_by_pycocotools(coco, found)
    for name, value in ranked.items():
        assert value == pytest.approx(expected[name], abs=1e-9)
    assert 0 < ranked["AP"] < 100


def test_ceilings_by_hand():
    """A wrong box first, a right one of IoU .7 with a duplicate, and an object never found."""
    results = analyzed(
        [(1, 1, GT, {}), (2, 1, GT, {})],
        [(1, 1, [200, 200, 50, 50], 0.9), (1, 1, wide(0.7), 0.8), (1, 1, wide(0.6), 0.7)],
        num_images=2,
    )
    # Recall 1/2 is reached at 51 of 101 points; the precision there is 1/2 as the wrong box leads.
    assert results["ap"]["AP50"] == pytest.approx(100 * 51 / 101 / 2)
    assert results["ap"]["AP75"] == 0
    ranked, placed = (results["ceilings"][f"perfect_{x}"] for x in ("ranking", "placing"))
    assert ranked["AP50"] == pytest.approx(100 * 51 / 101)
    assert ranked["AP75"] == 0
    assert placed["AP50"] == placed["AP95"] == pytest.approx(100 * 51 / 101 / 2)


def test_placing_lifts_boxes_from_a_tenth_on():
    def placed(iou):
        results = analyzed([(1, 1, GT, {})], [(1, 1, wide(iou), 0.5)])
        return results["ceilings"]["perfect_placing"]["AP"]

    assert placed(0.11) == 100
    assert placed(0.09) == 0


def test_duplicates_are_taken_out_when_placed():
    objects = [(1, 1, GT, {}), (1, 1, [200, 0, 50, 50], {})]
    detections = [(1, 1, wide(0.9), 0.9), (1, 1, wide(0.8), 0.8), (1, 1, [200, 0, 50, 40], 0.7)]
    results = analyzed(objects, detections)
    assert results["ap"]["AP50"] < 90
    assert results["ceilings"]["perfect_placing"]["AP"] == pytest.approx(100)


def test_nothing_found_and_nothing_to_find():
    found_nothing = analyzed([(1, 1, GT, {})], [])
    assert found_nothing["ap"]["AP"] == found_nothing["ceilings"]["perfect_ranking"]["AP"] == 0
    assert math.isnan(found_nothing["correlation"]["pearson"])
    assert math.isnan(found_nothing["calibration"][".50"]["ece"])
    nothing_there = analyzed([], [(1, 1, GT, 0.5)])
    assert math.isnan(nothing_there["ap"]["AP"])
    assert nothing_there["iou_bins"]["count"].tolist() == [1] + [0] * 19


def test_crowds_are_neither_right_nor_wrong():
    objects = [(1, 1, GT, {}), (1, 1, [200, 0, 100, 100], {"iscrowd": 1})]
    crowd = [(1, 1, [200 + 10 * i, 0, 20, 20], 0.9) for i in range(3)]
    results = analyzed(objects, [*crowd, (1, 1, wide(0.8), 0.5)])
    assert results["ap"]["AP50"] == pytest.approx(100)
    assert results["ceilings"]["perfect_placing"]["AP"] == pytest.approx(100)
    assert results["iou_bins"]["count"].sum() == 1
    assert results["calibration"][".50"]["count"].sum() == 1


# ---- correlation


@pytest.mark.parametrize("sign", [1, -1])
def test_correlation_of_scores_that_follow_the_iou(sign):
    ious = [0.55, 0.6, 0.7, 0.85, 0.95]
    objects = [(image, 1, GT, {}) for image in range(1, 6)]
    detections = [(i, 1, wide(iou), 0.5 + sign * iou / 4) for i, iou in enumerate(ious, start=1)]
    found = analyzed(objects, detections, num_images=5)["correlation"]
    assert found["count"] == 5
    for name in ("pearson", "spearman"):
        assert found[name] == pytest.approx(sign), name


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("levels", [4, 1000])
def test_correlations_are_those_of_all_pairs(seed, levels):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, levels, 57) / levels
    y = np.round((x + rng.random(57)) / 2, 2)
    found = correlations(x, y)
    dx, dy = (np.sign(v[:, None] - v[None]) for v in (x, y))
    ranks = [1 + (s > 0).sum(axis=1) + ((s == 0).sum(axis=1) - 1) / 2 for s in (dx, dy)]

    def pearson(a, b):
        a, b = a - a.mean(), b - b.mean()
        return (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())

    assert found["spearman"] == pytest.approx(pearson(*ranks), abs=1e-12)
    assert found["pearson"] == pytest.approx(pearson(x, y), abs=1e-12)


@pytest.mark.parametrize(("x", "y"), [([], []), ([0.5], [0.5]), ([0.1, 0.2], [0.3, 0.3])])
def test_correlation_with_a_constant_is_not_a_number(x, y):
    found = correlations(x, y)
    assert all(math.isnan(found[name]) for name in ("pearson", "spearman"))


# ---- bins and calibration


@pytest.mark.parametrize("n", [10, 20])
def test_bins_hold_their_lower_edge(n):
    edges = np.array([i / n for i in range(n + 1)])
    assert bins_of(edges, n).tolist() == [*range(n), n - 1]
    assert bins_of(np.array([0.0499, 0.9999]), 20).tolist() == [0, 19]


@pytest.mark.parametrize("seed", SEEDS)
def test_bins_of_random_data(seed):
    ground_truth, detections = arrays_of(*random_case(seed, decimals=3))
    results = analyze(ground_truth, detections).results
    _, _, iou = one_by_one(ground_truth, detections, 0.5)
    best = iou[:, ~ground_truth.ignored].max(axis=1)
    counts = best >= iou[:, ground_truth.ignored].max(axis=1)
    for i in range(20):
        upper = 1.1 if i == 19 else (i + 1) / 20
        inside = counts & (best >= i / 20) & (best < upper)
        assert results["iou_bins"]["count"][i] == inside.sum()
        assert results["iou_bins"]["share"][i] == pytest.approx(inside.sum() / counts.sum())
        mean = detections.scores[inside].mean() if inside.any() else math.nan
        assert results["iou_bins"]["mean_score"][i] == pytest.approx(mean, nan_ok=True)
    assert results["density"].sum(axis=1).tolist() == results["iou_bins"]["count"].tolist()


def test_calibration_of_a_known_distribution():
    """Of 10 detections of score .75 nine are right, of 30 of score .25 six: off by .15 and .05."""
    scores = np.array([0.75] * 10 + [0.25] * 30)
    right = np.array([True] * 9 + [False] + [True] * 6 + [False] * 24)
    found = calibration(scores, right)
    assert found["ece"] == pytest.approx((10 * 0.15 + 30 * 0.05) / 40)
    assert found["share_right"][7] == pytest.approx(0.9)
    assert found["share_right"][2] == pytest.approx(0.2)
    assert np.isnan(found["share_right"][[0, 1, 3, 4, 5, 6, 8, 9]]).all()


def test_a_calibrated_score_is_found_calibrated():
    rng = np.random.default_rng(0)
    scores = rng.random(200_000)
    assert calibration(scores, rng.random(200_000) < scores)["ece"] < 0.01
    assert calibration(scores, rng.random(200_000) < 0.5)["ece"] == pytest.approx(0.25, abs=0.01)


def test_calibration_depends_on_the_threshold():
    curves = analyzed([(1, 1, GT, {})], [(1, 1, wide(0.8), 0.75)])["calibration"]
    assert [curves[t]["share_right"][7] for t in (".50", ".75", ".90")] == [1, 1, 0]


# ---- outranked boxes


def test_outranked_objects():
    objects = [(image, 1, GT, {}) for image in (1, 2, 3, 4)]
    rows = detections_of([
        (1, 1, wide(0.6), 0.9), (1, 1, wide(0.8), 0.5),  # outranked
        (2, 1, wide(0.8), 0.9), (2, 1, wide(0.6), 0.5),  # as it should be
        (3, 1, wide(0.3), 0.9), (3, 1, wide(0.4), 0.5),  # no well-placed box
        (4, 1, wide(0.29), 0.9), (4, 1, wide(0.8), 0.5),  # hardly on the object: of another one
    ])  # fmt: skip
    analysis = analyze(*arrays_of(coco_of(objects, num_images=4), rows))
    found = outranked_objects(analysis.detections, analysis.best)
    assert found["gt"].tolist() == [0, 1, 3]
    assert analysis.best.iou[found["top"]] == pytest.approx([0.6, 0.8, 0.8])
    assert analysis.best.iou[found["placed"]] == pytest.approx([0.8, 0.8, 0.8])
    summary = analysis.results["outranked"]
    assert (summary["objects_outranked"], summary["objects_detected"]) == (1, 3)
    assert summary["mean_iou_lost"] == pytest.approx(0.2)


# ---- score thresholds, confusions and the verdict


@pytest.mark.parametrize("seed", SEEDS)
def test_best_thresholds_are_those_of_all_scores(seed):
    ground_truth, detections = arrays_of(*random_case(seed, share_difficult=0.1))
    results = analyze(ground_truth, detections).results
    outcome, _, _ = one_by_one(ground_truth, detections, 0.5)
    for k, of_class in enumerate(results["classes"].values()):
        objects = sum(ground_truth.label[~ground_truth.ignored] == k)
        best = {"f1": 0.0, "threshold": math.nan, "precision": math.nan, "recall": math.nan}
        for threshold in sorted({*detections.scores}, reverse=True):
            kept = [
                outcome[d]
                for d in range(len(detections))
                if detections.label[d] == k and detections.scores[d] >= threshold
            ]
            hits, wrong = kept.count(RIGHT), kept.count(WRONG)
            if hits and (f1 := 2 * hits / (hits + wrong + objects)) > best["f1"] + 1e-12:
                best = {"precision": hits / (hits + wrong), "recall": hits / objects}
                best |= {"threshold": threshold, "f1": f1}
        found = of_class["best_threshold"]
        for name in ("threshold", "precision", "recall"):
            assert found[name] == pytest.approx(best[name], nan_ok=True), (k, name)
        assert found["f1"] == pytest.approx(best["f1"] or math.nan, nan_ok=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_confusions_one_by_one(seed):
    coco, rows = random_case(seed, share_difficult=0.1)
    objects = coco.dataset["annotations"][::2]  # detected as another class, too
    rows += detections_of(
        (a["image_id"], a["category_id"] % 3 + 1, a["bbox"], 0.5) for a in objects
    )
    ground_truth, detections = arrays_of(coco, rows)
    limits = np.array([0.3, 0.2, 0.4, math.nan])
    outcome, matched, _ = one_by_one(ground_truth, detections, 0.5)
    iou = box_iou(torch.from_numpy(detections.boxes), torch.from_numpy(ground_truth.boxes)).numpy()
    label, expected = ground_truth.label, np.zeros((5, 5), int)
    free = {g for g in range(len(label)) if not ground_truth.ignored[g]}
    kept = [
        d for d in range(len(detections)) if detections.scores[d] >= limits[detections.label[d]]
    ]
    for d in kept:
        if outcome[d] == RIGHT:
            expected[detections.label[d], detections.label[d]] += 1
            free.remove(matched[d])
    for d in sorted(kept, key=lambda d: -detections.scores[d]):
        if outcome[d] == WRONG:
            near = [g for g in free if ground_truth.image[g] == detections.image[d]]
            near = [g for g in near if iou[d, g] >= 0.5]
            taken = max(near, key=lambda g: iou[d, g], default=None)
            expected[4 if taken is None else label[taken], detections.label[d]] += 1
            free -= {taken}
    for g in free:
        expected[label[g], 4] += 1
    ours = match(ground_truth, detections, find_pairs(ground_truth, detections), thresholds=[0.5])
    found = confusion_matrix(ground_truth, detections, ours[0][0], ours[1][0], limits)
    assert (found == expected).all()
    assert found[:4, :4].sum() > found.diagonal().sum(), "some classes are confused"
    assert found[:4].sum() == (~ground_truth.ignored).sum()


def test_confusions_are_at_the_best_thresholds():
    objects = [(1, 1, GT, {}), (2, 2, GT, {}), (2, 1, [200, 0, 50, 50], {})]
    detections = [(1, 1, wide(0.9), 0.8), (2, 1, wide(0.8), 0.9), (1, 2, GT, 0.7), (2, 2, GT, 0.2)]
    found = analyzed(objects, detections, num_images=2, num_classes=2)
    best = {name: c["best_threshold"] for name, c in found["classes"].items()}
    # Class 2 at .7 has nothing right, at .2 one of two.
    assert best["class1"] == {"threshold": 0.8, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert best["class2"] == pytest.approx(
        {"threshold": 0.2, "precision": 0.5, "recall": 1, "f1": 2 / 3}
    )
    # Of image 1's object, found as its own class, class 2's box is one too many.
    assert found["confusion"].tolist() == [[1, 0, 1], [0, 1, 0], [1, 1, 0]]


@pytest.mark.parametrize(
    ("ap", "ranking", "placing", "objects", "said"),
    [
        (40, 64, 68, 5000, "24 AP, perfect placing 28: try both, .*CLS_ETA.*LOC_LAMBDA.*[.]$"),
        (40, 64, 50, 5000, "24 AP, perfect placing 10: try both, .*CLS_ETA.*LOC_LAMBDA.*[.]$"),
        (40, 45, 68, 5000, "5 AP, perfect placing 28: try [^:]*LOC_LAMBDA[)] first[.]$"),
        (97, 97.5, 97.9, 5000, "neither loss can win much"),
        (40, 64, 68, 99, "Few data: 99 objects in 7 images"),
        (math.nan, math.nan, math.nan, 0, "no object to find"),
    ],
)
def test_the_verdict(ap, ranking, placing, objects, said):
    ceilings = {"perfect_ranking": {"AP": ranking}, "perfect_placing": {"AP": placing}}
    results = {"ap": {"AP": ap}, "ceilings": ceilings, "num_objects": objects, "num_images": 7}
    assert re.search(said, verdict(results))

"""The benchmark's drawn case: detections worth evaluating, the same in each process."""

import benchmark_evaluation

from iou_balanced_d2.evaluation import coco_metrics, evaluate_boxes


def test_drawn_case():
    coco, detections = benchmark_evaluation.draw_case(20, 50, 8)
    assert len(coco.imgs) == 20
    assert len(coco.anns) == 20 * benchmark_evaluation.OBJECTS_PER_IMAGE
    assert len(detections) == 20 * 50
    assert detections == benchmark_evaluation.draw_case(20, 50, 8)[1]
    metrics = coco_metrics(**evaluate_boxes(coco, detections), class_names=["x"] * 8)
    assert 10 < metrics["AP"] < 60


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(benchmark_evaluation, "available_implementations", dict)
    row = benchmark_evaluation.row_of("pycocotools", 1, 1, 1)
    assert row == {"implementation": "pycocotools (not installed)"}

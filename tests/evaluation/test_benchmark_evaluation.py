"""The benchmark's drawn case: detections worth evaluating, the same in each process."""

import json

import benchmark_evaluation
import pytest


def test_drawn_case(tmp_path):
    content, detections = benchmark_evaluation.draw_case(20, 50, 8)
    assert len(content["images"]) == 20
    assert len(content["annotations"]) == 20 * benchmark_evaluation.OBJECTS_PER_IMAGE
    assert len(detections) == 20 * 50
    assert detections == benchmark_evaluation.draw_case(20, 50, 8)[1]
    file = tmp_path / "truth.json"
    file.write_text(json.dumps(content))
    ours, theirs = (f(str(file), detections) for f in benchmark_evaluation.EVALUATORS.values())
    assert 10 < ours["AP"] < 60
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs)

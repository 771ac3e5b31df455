"""BoxEvaluator as detectron2 calls it: from model outputs to results, files and tables."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator, print_csv_format
from detectron2.structures import Boxes, BoxMode, Instances

from iou_balanced_d2.data import prepare_dataset, register_coco_json
from iou_balanced_d2.errors import UserError
from iou_balanced_d2.evaluation import BoxEvaluator

from ..command import forget_own_data


@pytest.fixture
def dataset(own_data):
    """The data set of 4 squares, its metadata as after loading; given a function to register."""
    name = "evaluated"
    register_coco_instances(name, {}, *own_data)
    DatasetCatalog.get(name)
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def outputs_of(*rows, size=(64, 64)):
    """A model's output of (XYXY box, score, class)."""
    instances = Instances(size)
    instances.pred_boxes = Boxes(torch.tensor([r[0] for r in rows]).reshape(-1, 4))
    instances.scores = torch.tensor([r[1] for r in rows])
    instances.pred_classes = torch.tensor([r[2] for r in rows], dtype=torch.int64)
    return [{"instances": instances}]


def found(i, score=0.9, shift=0.0):
    """The square of image i."""
    return ([8.0, 10.0 + i + shift, 36.0, 40.0 + i + shift], score, 0)


def run(evaluator, outputs):
    evaluator.reset()
    for i, output in enumerate(outputs):
        evaluator.process([{"image_id": i}], output)
    return evaluator.evaluate()


@pytest.mark.parametrize(
    ("ids", "original"),
    [
        ([-1, 0, 1, 2], None),
        (["1", 2, 3, 4], None),
        ([0, 1, 2**60, 7], None),
        ([1, 2, 3, 4], [2, 3, 4, 1]),  # a field of the user's own
        ([1, 2, 3, 4], [3, 9, 8, 5]),
    ],
)
def test_images_of_any_ids_are_told_apart(tmp_path, own_data, ids, original):
    content = json.loads(Path(own_data[0]).read_text())
    for image, new, other in zip(content["images"], ids, original or ids, strict=True):
        image["id"] = new
        if original:
            image["original_id"] = other
    for annotation in content["annotations"]:
        annotation["image_id"] = ids[annotation["image_id"]]
    Path(own_data[0]).write_text(json.dumps(content))
    forget_own_data()
    register_coco_json("own", *own_data)
    prepare_dataset("own")
    evaluator = BoxEvaluator("own", str(tmp_path / "out"))
    evaluator.reset()
    for record in DatasetCatalog.get("own"):
        i = int(Path(record["file_name"]).stem)
        rows = [found(i)] if i < 2 else []  # half of the objects
        evaluator.process([{"image_id": record["image_id"]}], outputs_of(*rows))
    assert evaluator.evaluate()["bbox"]["AP-square"] == pytest.approx(100 * 51 / 101)


def test_results_are_detectron2s_and_more(tmp_path, dataset):
    outputs = [outputs_of(found(i, 0.9 - i / 10, 1.5 * i), ([0.0] * 4, 0.3, 1)) for i in range(3)]
    outputs.append(outputs_of())
    ours = run(BoxEvaluator(dataset, str(tmp_path / "ours")), outputs)["bbox"]
    stock = run(COCOEvaluator(dataset, output_dir=str(tmp_path / "stock")), outputs)["bbox"]
    for name, value in stock.items():
        assert ours[name] == pytest.approx(value, nan_ok=True), name
    assert 0 < ours["AP95"] < ours["AP50"] < 100
    files = [json.loads((tmp_path / f / "coco_instances_results.json").read_text())
             for f in ("ours", "stock")]  # fmt: skip
    assert files[0] == files[1]
    assert files[0][0]["category_id"] == 7
    assert all(type(x) is float for x in ours.values())


def test_json_keeps_the_models_precision(tmp_path, dataset):
    row = ([1 / 3, 0.1, 40.0, 50.0], 1 / 7, 0)
    run(BoxEvaluator(dataset, str(tmp_path)), [outputs_of(row)])
    (content,) = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert np.float32(content["score"]) == np.float32(1 / 7)
    assert np.float32(content["bbox"][:2]).tolist() == np.float32(row[0][:2]).tolist()


def test_a_broken_off_evaluation_leaves_the_earlier_detections(tmp_path, dataset):
    run(BoxEvaluator(dataset, str(tmp_path)), [outputs_of(found(0))])
    results = tmp_path / "coco_instances_results.json"
    before, names = results.read_bytes(), set(tmp_path.iterdir())
    evaluator = BoxEvaluator(dataset, str(tmp_path))
    evaluator.reset()
    for image_id in (0, b"not written"):
        evaluator.process([{"image_id": image_id}], outputs_of(found(1)))
    with pytest.raises(TypeError):
        evaluator.evaluate()
    assert results.read_bytes() == before
    assert set(tmp_path.iterdir()) == names


def test_tables_and_csv_line(tmp_path, dataset, caplog):
    caplog.set_level(logging.INFO)
    results = run(BoxEvaluator(dataset, str(tmp_path)), [outputs_of(found(i)) for i in range(4)])
    text = caplog.text
    assert "Evaluating 4 boxes" in text
    for row in ("| AP of objects | .50:.95 | .50 | .55 | .60 |", "| small | 100.00 | 100.00 |",
                "| square | 4 | 100.00 |", "| circle | 0 | nan |"):  # fmt: skip
        assert row in " ".join(text.split())
    print_csv_format(results)
    assert "AP,AP50,AP55,AP60,AP65,AP70,AP75,AP80,AP85,AP90,AP95,APs,APm,APl" in caplog.text
    assert "voc" not in results


@pytest.mark.parametrize("outputs", [[], [outputs_of()] * 4], ids=["no image", "no detection"])
def test_nothing_found(tmp_path, dataset, outputs):
    metrics = run(BoxEvaluator(dataset, str(tmp_path)), outputs)["bbox"]
    assert [metrics[n] for n in ("AP", "AP50", "AP95", "AR100", "AP-square")] == [0] * 5
    assert np.isnan(metrics["AP-circle"])
    assert json.loads((tmp_path / "coco_instances_results.json").read_text()) == []


def test_objects_on_images_without_detections_are_missed(dataset):
    evaluator = BoxEvaluator(dataset)
    outputs = [outputs_of(found(i)) for i in range(2)]
    assert run(evaluator, outputs)["bbox"]["AP"] == pytest.approx(100 * 51 / 101)


def test_voc_style(tmp_path, dataset, own_data, caplog):
    """With VOC's metric beside it, and difficult objects by their policy."""
    caplog.set_level(logging.INFO)
    content = json.loads(Path(own_data[0]).read_text())
    content["annotations"][3]["difficult"] = 1
    Path(own_data[0]).write_text(json.dumps(content))
    MetadataCatalog.get(dataset).voc_style = True
    outputs = [outputs_of(found(i)) for i in range(3)] + [outputs_of()]
    expected = {"ignore": (100, 100), "drop": (100, 100), "count": (75, 100 * 8 / 11)}
    for policy, (area, points) in expected.items():
        results = run(BoxEvaluator(dataset, str(tmp_path), difficult=policy), outputs)
        assert list(results) == ["bbox", "voc"]
        assert results["voc"]["AP50_area"] == pytest.approx(area)
        assert results["voc"]["AP50_11pt"] == pytest.approx(points)
    assert "| VOC AP, 11 points |" in caplog.text
    print_csv_format(results)
    assert "Task: voc" in caplog.text


def test_data_set_in_detectron2s_form(tmp_path):
    """Converted to COCO's format, anew each time: a file left by an earlier run is not believed."""
    name, annotation = "in_python", {"bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    image = {"file_name": "0.png", "image_id": 0, "height": 64, "width": 64}
    boxes = [[8, 10, 36, 40]]
    try:
        for shift in (0, 5):
            rows = [{**annotation, "bbox": [x + shift for x in box]} for box in boxes]
            DatasetCatalog.register(name, lambda rows=rows: [{**image, "annotations": rows}])
            MetadataCatalog.get(name).thing_classes = ["square"]
            evaluator = BoxEvaluator(name, str(tmp_path))
            metrics = run(evaluator, [outputs_of(found(0))])["bbox"]
            assert (metrics["AP-square"] > 99) == (shift == 0)
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    finally:
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_without_annotations_detections_are_written(tmp_path, dataset, own_data):
    content = json.loads(Path(own_data[0]).read_text())
    del content["annotations"]
    Path(own_data[0]).write_text(json.dumps(content))
    assert run(BoxEvaluator(dataset, str(tmp_path)), [outputs_of(found(0))]) == {}
    assert len(json.loads((tmp_path / "coco_instances_results.json").read_text())) == 1


def test_mistakes(dataset):
    with pytest.raises(UserError, match="VOC_DIFFICULT must be one of"):
        BoxEvaluator(dataset, difficult="skip")
    with pytest.raises(UserError, match="has 2 classes, but the model found objects of class 5"):
        run(BoxEvaluator(dataset), [outputs_of(([8.0, 10.0, 36.0, 40.0], 0.9, 5))])

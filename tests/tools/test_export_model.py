"""Exported files against the detector they are of; the tool's messages."""

import json
import sys
from pathlib import Path

import cv2
import onnx
import onnxruntime
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from iou_balanced_d2.commands import export_model, run_command
from iou_balanced_d2.engine import load_config
from iou_balanced_d2.errors import UserError
from iou_balanced_d2.model_zoo import get_config_file
from iou_balanced_d2.modeling.export import (
    detect,
    export_onnx,
    export_torchscript,
    plain_detector,
)

from ..command import forget_own_data
from ..modeling.test_tta import detector
from ..projects.ssd_toy import toy_config as ssd_config
from ..toy import CONFIG, toy_inputs, toy_model

TOY = [
    "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64",
    "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.FPN.OUT_CHANNELS", "16",
    "MODEL.RETINANET.NUM_CONVS", "1", "MODEL.RETINANET.NUM_CLASSES", "3",
    "MODEL.RETINANET.SCORE_THRESH_TEST", "0.005", "INPUT.MIN_SIZE_TEST", "64",
]  # fmt: skip


def image(height=96, width=128, seed=3):
    return toy_inputs((), (), size=(height, width), seed=seed)["image"].float()


def assert_same(found, model, given):
    """Boxes and scores to 1e-3, as eager: in the same order, with the same classes."""
    with torch.no_grad():
        boxes, scores, classes = detect(model, [{"image": given}])
    assert len(boxes) > 10
    found = [torch.as_tensor(x) for x in found]
    torch.testing.assert_close(found[0], boxes, rtol=0, atol=1e-3)
    torch.testing.assert_close(found[1], scores, rtol=0, atol=1e-3)
    assert torch.equal(found[2], classes)


def onnx_session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run the tool in this process on a toy RetinaNet's weights; returns its exit code."""
    monkeypatch.chdir(tmp_path)
    torch.save({"model": detector()[1].state_dict()}, "weights.pth")

    def run(*args, weights="weights.pth", opts=()):
        argv = ["export_model.py", "--config-file", get_config_file(CONFIG), "--output", "out"]
        opts = [*TOY, "MODEL.WEIGHTS", weights, *opts]
        monkeypatch.setattr(sys, "argv", [*argv, *args, *opts])
        return run_command("export")

    return run


@pytest.mark.parametrize("name", ["torchscript", "onnx"])
def test_a_file_detects_as_the_detector_in_images_of_any_size(name, command, tmp_path, capsys):
    file = str(tmp_path / "image.png")
    cv2.imwrite(file, image().permute(1, 2, 0).numpy())
    assert command("--format", name, "--image", file) == 0
    assert " written; checked: " in capsys.readouterr().out
    model = detector()[1]
    if name == "onnx":
        session = onnx_session(tmp_path / "out/model.onnx")
        assert [x.name for x in session.get_inputs()] == ["image"]
        assert [x.name for x in session.get_outputs()] == ["boxes", "scores", "classes"]
    else:
        exported = torch.jit.load(str(tmp_path / "out/model.ts"))
    for size in ((96, 128), (150, 70)):
        given = image(*size, seed=4)
        found = session.run(None, {"image": given.numpy()}) if name == "onnx" else exported(given)
        assert_same(found, model, given)
    described = json.loads((tmp_path / "out/model.json").read_text())
    assert described["channels"] == "BGR"
    assert described["keep_aspect_ratio"]
    assert described["class_names"] == [], "the config's data set has 80, the model 3"


def test_grey_images_have_one_channel(command, tmp_path):
    grey = ["INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", "[100.0]", "MODEL.PIXEL_STD", "[1.0]"]
    cfg = load_config(get_config_file(CONFIG), [*TOY, *grey, "MODEL.DEVICE", "cpu"])
    torch.save({"model": build_model(cfg).state_dict()}, "grey.pth")
    assert command(weights="grey.pth", opts=grey) == 0
    assert "(1, H, W)" in json.loads((tmp_path / "out/model.json").read_text())["input"]


def test_the_classes_of_ones_own_data_are_named(command, own_data, tmp_path, capsys):
    forget_own_data()
    content = json.loads(Path(own_data[0]).read_text())
    content["categories"].append({"id": 11, "name": "disc"})
    Path(own_data[0]).write_text(json.dumps(content))
    own = ["DATASETS.COCO_JSON", str([["own", *own_data]]), "DATASETS.TEST", "('own',)"]
    assert command(opts=own) == 0
    described = json.loads((tmp_path / "out/model.json").read_text())
    assert described["class_names"] == ["square", "circle", "disc"]
    forget_own_data()
    Path(own_data[0]).unlink()
    assert command(opts=[*own, "DATASETS.TRAIN", "('own',)"]) == 0
    assert json.loads((tmp_path / "out/model.json").read_text())["class_names"] == []
    assert "model.json has no class names" in capsys.readouterr().err


def test_ssds_own_size_is_told():
    cfg = ssd_config()
    described = export_model.describe(cfg, export_model.sample_image(cfg, None))
    assert (described["min_size"], described["max_size"]) == (128, 128)
    assert not described["keep_aspect_ratio"]


def test_the_graph_is_plain_retinanets(tmp_path):
    ours, stock = toy_model().train(), toy_model("MODEL.META_ARCHITECTURE", "RetinaNet")
    kinds = []
    for model in (ours, stock):
        plain = plain_detector(model)
        assert not [name for name, _ in plain.named_modules() if "iou_balanced" in name]
        assert plain.state_dict().keys() == model.state_dict().keys()
        path = str(tmp_path / "model.ts")
        export_torchscript(plain, image(), path)
        graph = torch.jit.load(path).inlined_graph
        kinds.append([node.kind() for node in graph.nodes()])
        assert not plain.training
    assert kinds[0] == kinds[1]
    # The detector it is a copy of is left alone.
    assert ours.training
    assert ours.iou_balanced_loss is not None
    assert all(p.requires_grad for p in ours.parameters())


@pytest.mark.parametrize("name", ["fcos", "ssd"])
def test_the_projects_detectors_are_exported_too(name, tmp_path):
    model = plain_detector(detector(name)[1])
    path = str(tmp_path / "model.onnx")
    # SSD is for images of one size.
    export_onnx(model, image(128, 128), path)
    onnx.checker.check_model(path)
    given = image(128, 128, seed=5)
    assert_same(onnx_session(path).run(None, {"image": given.numpy()}), model, given)


def test_an_example_without_detections_is_as_good(tmp_path):
    model = plain_detector(detector()[1])
    path = str(tmp_path / "model.ts")
    black = torch.zeros(3, 64, 96)
    for module in (model.head.cls_score, model.head.bbox_pred):
        torch.nn.init.zeros_(module.bias)
    torch.nn.init.constant_(model.head.cls_score.bias, -4.0)
    model.test_score_thresh = 0.025
    model.pixel_mean.zero_()
    assert len(detect(model, [{"image": black}])[0]) == 0
    export_torchscript(model, black, path)
    given = image()
    assert_same(torch.jit.load(path)(given), model, given)


def test_mistakes_are_one_line(command, tmp_path, capsys, monkeypatch):
    assert command(weights="nothing.pth") == 2
    assert "error: MODEL.WEIGHTS 'nothing.pth' not found" in capsys.readouterr().err
    assert command(weights="") == 2
    assert "error: nothing to export: give MODEL.WEIGHTS FILE" in capsys.readouterr().err
    assert command("--image", "nothing.jpg") == 2
    assert "error: --image 'nothing.jpg' can't be read: No such" in capsys.readouterr().err
    assert command("--image", "weights.pth") == 2
    assert "error: --image 'weights.pth' can't be read: not an image" in capsys.readouterr().err
    assert command("--output", "weights.pth") == 2
    assert "error: 'weights.pth' can't be written: File exists" in capsys.readouterr().err
    assert command("INPUT.FORMAT", "BGR", "--format", "onnx") == 2
    assert "error: --format must stand before the KEY VALUE" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install onnx"):
        export_onnx(plain_detector(toy_model()), image(), "model.onnx")
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"), pytest.raises(UserError, match="GeneralizedRCNN can't be exported"):
        plain_detector(build_model(cfg))


def test_a_difference_is_told(monkeypatch):
    boxes, scores, classes = torch.rand(3, 4), torch.rand(3), torch.tensor([0, 1, 1])
    monkeypatch.setattr(
        export_model, "run_file", lambda path: lambda image: (boxes, scores, classes)
    )
    for change, words in ((0, "checked: 3 detections"), (1, "WARNING: not equal")):
        assert export_model.check(
            "model.ts", (boxes + change, scores, classes), image()
        ).startswith(words)
    fewer = export_model.check("model.ts", (boxes[1:], scores[1:], classes[1:]), image())
    assert fewer == "WARNING: 3 detections, where the detector has 2"
    monkeypatch.setattr(export_model, "run_file", lambda path: None)
    assert "onnxruntime" in export_model.check("model.onnx", (boxes, scores, classes), image())

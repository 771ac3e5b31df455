"""The model zoo: detectron2's functions on this project's configs."""

from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from iou_balanced_d2 import model_zoo
from iou_balanced_d2.modeling import IoUBalancedRetinaNet

from .toy import toy_model

ROOT = Path(__file__).parent.parent
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x_iou_balanced.yaml"
CONFIGS = sorted(f.relative_to(ROOT / "configs") for f in ROOT.glob("configs/**/*.yaml"))
PROJECT_CONFIGS = sorted(
    Path(f.relative_to(ROOT / "projects").as_posix().replace("/configs/", "/", 1))
    for f in ROOT.glob("projects/*/configs/**/*.yaml")
)


@pytest.mark.parametrize("path", [*CONFIGS, *PROJECT_CONFIGS], ids=lambda p: p.stem)
def test_every_config_is_found_under_its_name(path):
    cfg = model_zoo.get_config(path.as_posix())
    assert isinstance(cfg, CfgNode)
    assert Path(model_zoo.get_config_file(path.as_posix())).name == path.name
    assert "FCOS" in cfg.MODEL  # the projects' keys are there


def test_projects_have_configs():
    assert {path.parts[0] for path in PROJECT_CONFIGS} >= {"FCOS", "SSD"}


@pytest.mark.parametrize("zoo", [model_zoo, detectron2_zoo])
def test_what_is_not_there_raises_as_in_detectron2(zoo):
    with pytest.raises(RuntimeError, match=r"nothing\.yaml not available"):
        zoo.get_config_file("COCO-Detection/nothing.yaml")


def test_get_builds_the_model_on_the_device_with_the_configs_weights(tmp_path, monkeypatch):
    trained = toy_model("MODEL.META_ARCHITECTURE", "RetinaNet")
    torch.nn.init.constant_(trained.head.cls_score.bias, -1.25)
    weights = str(tmp_path / "weights.pth")
    torch.save({"model": trained.state_dict()}, weights)
    config = tmp_path / "configs" / "toy.yaml"
    config.parent.mkdir()
    config.write_text(
        f"_BASE_: {model_zoo.get_config_file(RETINANET)}\n"
        f"MODEL:\n  WEIGHTS: {weights}\n  BACKBONE: {{FREEZE_AT: 0}}\n  FPN: {{OUT_CHANNELS: 16}}\n"
        "  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, NORM: BN}\n"
        "  RETINANET: {NUM_CONVS: 1, NUM_CLASSES: 3}\n"
    )
    monkeypatch.setattr(model_zoo, "_ROOTS", (tmp_path,))
    model = model_zoo.get("toy.yaml", device="cpu")
    assert type(model) is IoUBalancedRetinaNet
    assert model.training
    assert model.device == torch.device("cpu")
    for name, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_projects_model_is_built_from_its_name():
    cfg = model_zoo.get_config("FCOS/COCO-Detection/fcos_R_50_FPN_1x_iou_balanced.yaml")
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        assert type(build_model(cfg)).__name__ == "IoUBalancedFCOS"

"""SSD's structure and inference: against torchvision's with the same weights, and shapes."""

import copy

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone, build_model
from detectron2.structures import Boxes
from torchvision.models.detection._utils import SSDMatcher as TorchvisionMatcher
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList

from iou_balanced_d2.engine import load_config
from iou_balanced_d2.errors import UserError
from iou_balanced_d2.projects.ssd import SSD, IoUBalancedSSD, SSDDefaultBoxes, SSDMatcher
from iou_balanced_d2.projects.ssd.convert import convert_ssd300, convert_vgg16
from iou_balanced_d2.projects.ssd.vgg import VGG16

from .ssd_toy import CONFIGS, toy_config, toy_model

SSD300 = str(CONFIGS / "COCO-Detection/ssd300_VGG16_iou_balanced.yaml")
SSD512 = str(CONFIGS / "COCO-Detection/ssd512_VGG16.yaml")
VOC512 = str(CONFIGS / "PascalVOC-Detection/ssd512_VGG16.yaml")
RESNET = str(CONFIGS / "Own/ssd300_R_50.yaml")
CPU = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]


@pytest.fixture(scope="module")
def theirs():
    """torchvision's SSD300 of 5 classes, with random weights and scores that differ."""
    torch.manual_seed(0)
    model = torchvision.models.detection.ssd300_vgg16(
        weights=None, weights_backbone=None, num_classes=6, score_thresh=0.02
    )
    with torch.no_grad():
        for parameter in model.parameters():  # biases of 0 would say nothing of their order
            parameter.add_(torch.randn_like(parameter) * 0.001)
        # Pixels reach 255: scores of 1.0, many times over, would have no order.
        model.backbone.features[0].weight.mul_(0.01)
    return model.eval()


@pytest.fixture(scope="module")
def ours(theirs):
    model = build_model(load_config(SSD300, [*CPU, "MODEL.SSD.NUM_CLASSES", 5])).eval()
    model.load_state_dict(theirs.state_dict(), strict=True)
    return model


def test_a_torchvision_checkpoint_gives_torchvisions_detections(ours, theirs):
    image = torch.randint(0, 256, (3, 300, 300), dtype=torch.uint8)
    with torch.no_grad():
        expected = theirs([image.float() / 255])[0]
        found = ours([{"image": image, "height": 300, "width": 300}])[0]["instances"]
    # detectron2 leaves out boxes that have no area inside the image.
    sides = expected["boxes"][:, 2:] - expected["boxes"][:, :2]
    expected = {k: v[(sides > 0).all(dim=1)] for k, v in expected.items()}
    assert len(found) == len(expected["boxes"]) > 50
    torch.testing.assert_close(found.scores, expected["scores"], rtol=0, atol=1e-4)
    torch.testing.assert_close(found.pred_boxes.tensor, expected["boxes"], rtol=1e-4, atol=1e-4)
    assert found.pred_classes.equal(expected["labels"] - 1)


def test_boxes_come_back_in_the_images_own_size(ours):
    image = torch.randint(0, 256, (3, 300, 300), dtype=torch.uint8)
    with torch.no_grad():
        square, wide = (
            ours([{"image": image, "height": 300, "width": width}])[0]["instances"].pred_boxes
            for width in (300, 600)
        )
    scale = torch.tensor([2.0, 1.0, 2.0, 1.0])
    torch.testing.assert_close(wide.tensor, square.tensor * scale)


@pytest.mark.parametrize(("config", "num_boxes"), [(SSD300, 8732), (RESNET, 8732), (SSD512, 24564)])
def test_feature_maps_and_number_of_default_boxes(config, num_boxes):
    cfg = load_config(config, CPU)
    with torch.device("meta"):  # shapes alone
        backbone = build_backbone(cfg)
    size = cfg.MODEL.SSD.SIZE
    features = backbone(torch.empty(1, 3, size, size, device="meta"))
    sides = {300: [38, 19, 10, 5, 3, 1], 512: [64, 32, 16, 8, 4, 2, 1]}[size]
    assert [x.shape[2:] for x in features.values()] == [(side, side) for side in sides]
    shapes = backbone.output_shape()
    assert {k: x.shape[1] for k, x in features.items()} == {
        k: shape.channels for k, shape in shapes.items()
    }
    boxes = SSDDefaultBoxes(cfg, list(shapes.values()))(list(features.values()))
    assert sum(len(level) for level in boxes) == num_boxes


@pytest.mark.parametrize("config", [SSD300, SSD512, VOC512])
def test_default_boxes_are_torchvisions(config):
    keys = load_config(config).MODEL.SSD
    sides = {300: [38, 19, 10, 5, 3, 1], 512: [64, 32, 16, 8, 4, 2, 1]}[keys.SIZE]
    features = [torch.empty(1, 1, side, side) for side in sides]
    theirs = DefaultBoxGenerator(keys.ASPECT_RATIOS, scales=keys.SCALES, steps=keys.STEPS)
    images = ImageList(torch.empty(1, 3, keys.SIZE, keys.SIZE), [(keys.SIZE, keys.SIZE)])
    ours = SSDDefaultBoxes(
        size=keys.SIZE,
        scales=keys.SCALES,
        aspect_ratios=keys.ASPECT_RATIOS,
        steps=keys.STEPS,
    )
    torch.testing.assert_close(Boxes.cat(ours(features)).tensor, theirs(images, features)[0])
    assert ours.num_anchors == theirs.num_anchors_per_location()


def test_default_boxes_for_another_number_of_feature_maps_are_refused():
    with pytest.raises(ValueError, match=r"expected one more of MODEL\.SSD\.SCALES"):
        SSDDefaultBoxes(size=300, scales=[0.1], aspect_ratios=[[2]], steps=[8])
    with pytest.raises(ValueError, match=r"MODEL\.SSD\.STEPS has 2 entries, but there are 3"):
        build_model(
            toy_config("MODEL.SSD.STEPS", [8, 16], "MODEL.SSD.SCALES", [0.1, 0.3, 0.6],
                       "MODEL.SSD.ASPECT_RATIOS", [[2], [2]])
        )  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_matching_is_torchvisions(seed):
    generator = torch.Generator().manual_seed(seed)
    iou = torch.rand(6, 40, generator=generator) ** 2
    iou[1, iou[0].argmax()] = 1.0  # two ground truths whose best box is the same one
    matches, labels = SSDMatcher(0.5)(iou)
    expected = TorchvisionMatcher(0.5)(iou)
    assert labels.bool().equal(expected >= 0)
    assert matches[labels.bool()].equal(expected[expected >= 0])
    assert labels.dtype == torch.int8
    matches, labels = SSDMatcher(0.5)(iou[:0])
    assert not labels.any()
    assert len(matches) == 40


def test_vgg16_from_imagenet_is_decimated_to_fc6_and_fc7():
    """As in the SSD paper: every 4th output, and of fc6 each third place of 7x7."""
    with torch.device("meta"):
        shapes = torchvision.models.vgg16(weights=None).state_dict()
        vgg = VGG16()
    # Numbers that tell the places apart, as far as float32 can.
    state = {
        k: torch.arange(v.numel(), dtype=torch.float32).view(v.shape) for k, v in shapes.items()
    }
    converted = convert_vgg16(state)
    names = {f"backbone.bottom_up.{name}" for name in vgg.state_dict()}
    assert set(converted) == names - {"backbone.bottom_up.conv4_3_scale"}
    fc6 = converted["backbone.bottom_up.fc6.weight"]
    assert fc6.shape == (1024, 512, 3, 3)
    first_layer = state["classifier.0.weight"]
    for out, channel, y, x in ((0, 0, 0, 0), (3, 7, 1, 2), (1023, 511, 2, 0)):
        column = channel * 49 + 3 * y * 7 + 3 * x
        assert fc6[out, channel, y, x] == first_layer[4 * out, column]
    fc7 = converted["backbone.bottom_up.fc7.weight"]
    assert fc7[5, 9, 0, 0] == state["classifier.3.weight"][20, 36]
    without = {k: v for k, v in state.items() if k.startswith("features")}
    assert set(convert_vgg16(without)) == {n for n in converted if ".fc" not in n}
    state["classifier.0.weight"].fill_(float("nan"))  # torchvision's file of SSD's features
    assert set(convert_vgg16(state)) == set(convert_vgg16(without))


def test_model_weights_take_a_vgg16_file(tmp_path, ours, caplog):
    with torch.device("meta"):
        shapes = torchvision.models.vgg16(weights=None).features.state_dict()
    state = {f"features.{k}": torch.randn(v.shape) for k, v in shapes.items()}
    torch.save(state, tmp_path / "vgg16.pth")
    model = copy.deepcopy(ours)
    DetectionCheckpointer(model).load(str(tmp_path / "vgg16.pth"))
    assert model.backbone.bottom_up.features[0].weight.equal(state["features.0.weight"])
    assert model.backbone.bottom_up.features[28].bias.equal(state["features.28.bias"])
    assert model.head.cls_score[0].weight.equal(ours.head.cls_score[0].weight)


def test_scores_of_other_classes_are_left_out(theirs, caplog):
    model = build_model(load_config(SSD300, [*CPU, "MODEL.SSD.NUM_CLASSES", 3]))
    missing = model.load_state_dict(theirs.state_dict(), strict=False).missing_keys
    assert missing == [f"head.cls_score.{i}.{k}" for i in range(6) for k in ("weight", "bias")]


def test_chosen_classes_keep_their_scores(ours, theirs):
    converted = convert_ssd300(theirs.state_dict(), classes=[4, 2])
    bias = ours.head.cls_score[1].bias.view(6, 6)  # 6 default boxes, 5 classes and background
    assert converted["head.cls_score.1.bias"].view(6, 3).equal(bias[:, [3, 1, 5]])


def test_of_torchvisions_90_classes_a_detector_of_80_gets_cocos():
    theirs = torchvision.models.detection.ssd300_vgg16(
        weights=None, weights_backbone=None, num_classes=91
    )
    bias = theirs.head.classification_head.module_list[0].bias.view(4, 91)
    with torch.no_grad():
        bias.copy_(torch.arange(91.0).expand(4, 91))  # each class's number
    model = build_model(load_config(SSD300, CPU))
    model.load_state_dict(theirs.state_dict(), strict=True)
    ids = MetadataCatalog.get("coco_2017_val").thing_dataset_id_to_contiguous_id
    assert model.head.cls_score[0].bias.view(4, 81)[0].tolist() == [*ids, 0]
    assert list(ids.values()) == list(range(80))


def test_inference_and_checkpoints_are_the_same_for_both():
    names = ("forward_inference", "inference_single_image", "forward", "preprocess_image")
    for name in names:
        assert getattr(SSD, name) is getattr(IoUBalancedSSD, name)
    plain, balanced = (toy_model("MODEL.META_ARCHITECTURE", n) for n in ("SSD", "IoUBalancedSSD"))
    plain.load_state_dict(balanced.state_dict(), strict=True)
    balanced.load_state_dict(plain.state_dict(), strict=True)
    assert META_ARCH_REGISTRY.get("IoUBalancedSSD") is IoUBalancedSSD


@pytest.mark.parametrize("shape", [(128, 96), (256, 256)])
def test_images_of_another_size_are_refused(shape):
    """The default boxes would lie beside the feature maps' places."""
    image = {"image": torch.zeros(3, *shape), "height": 50, "width": 50}
    with pytest.raises(UserError, match=r"MODEL\.SSD\.SIZE, 128x128, and got one of"):
        toy_model().eval()([image])


def test_frozen_stages_are_not_trained():
    vgg = VGG16()
    vgg.freeze(2)
    frozen = {name.split(".")[1] for name, p in vgg.named_parameters() if not p.requires_grad}
    assert frozen == {"0", "2", "5", "7"}
    vgg = VGG16()
    vgg.freeze(0)
    assert all(p.requires_grad for p in vgg.parameters())

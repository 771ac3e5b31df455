"""Test-time augmentation: against the plain detector, and against the merge done by hand."""

import copy

import cv2
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.evaluation import inference_context
from detectron2.modeling import build_model
from torchvision.ops import box_iou

from iou_balanced_d2.errors import UserError
from iou_balanced_d2.modeling.tta import DenseDetectorWithTTA

from ..projects.ssd_toy import toy_config as ssd_config
from ..projects.test_fcos import config as fcos_config
from ..toy import toy_config, toy_inputs

CONFIGS = {"retinanet": toy_config, "fcos": fcos_config, "ssd": ssd_config}


def options(min_sizes, flip):
    return ("TEST.AUG.MIN_SIZES", min_sizes, "TEST.AUG.FLIP", flip, "TEST.AUG.MAX_SIZE", 1000)


def detector(name="retinanet", min_sizes=(96,), flip=False):
    """A detector whose untrained boxes and scores differ enough to tell, and its config."""
    torch.manual_seed(0)
    cfg = CONFIGS[name](*map(str if name == "fcos" else lambda x: x, options(min_sizes, flip)))
    model = build_model(cfg).eval()
    model.test_score_thresh = 0.005
    if name == "ssd":
        for conv in model.head.cls_score:
            torch.nn.init.normal_(conv.weight, std=0.01)
    else:
        torch.nn.init.normal_(model.head.cls_score.weight, std=0.004)
        torch.nn.init.normal_(model.head.bbox_pred.weight, std=0.0005)
    if name == "fcos":
        torch.nn.init.constant_(model.head.bbox_pred.bias, 3.0)
    return cfg, model


def image_input(height=None, width=None, seed=3):
    """An image as the data loader gives it: at 96x128, of an original of another size."""
    given = toy_inputs((), (), seed=seed)
    given.update(height=height or 96, width=width or 128)
    return given


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("original", [(96, 128), (333, 441)])
def test_one_size_and_no_flip_is_the_plain_detector(name, original):
    cfg, model = detector(name, min_sizes=(128,) if name == "ssd" else (96,))
    given = [image_input(*original), image_input(*original, seed=4)]
    if name == "ssd":  # squares, as its loader gives them
        for x in given:
            square = torch.nn.functional.interpolate(x["image"][None].float(), (128, 128))[0]
            x["image"] = square.to(x["image"].dtype)
    before = copy.deepcopy(given)
    with torch.no_grad():
        # One by one, as the convolutions of a batch round differently.
        expected = [model([x])[0] for x in given]
    found = DenseDetectorWithTTA(cfg, model)(given)
    for a, b in zip(expected, found, strict=True):
        a, b = a["instances"], b["instances"]
        assert len(a) > 10
        assert a.image_size == b.image_size == original
        assert torch.equal(a.scores, b.scores)
        assert torch.equal(a.pred_classes, b.pred_classes)
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
    # Neither the inputs nor the detector are changed.
    assert all(x.keys() == y.keys() and (x["image"] == y["image"]).all()
               for x, y in zip(given, before, strict=True))  # fmt: skip
    assert model.test_nms_thresh < 1
    assert model.max_detections_per_image <= 200


def merged_by_hand(model, given, min_sizes):
    """Candidates of each version, each mapped back by its own arithmetic, one greedy NMS."""
    height, width = given["height"], given["width"]
    boxes, scores, classes = [], [], []
    for size in min_sizes:
        image = given["image"].permute(1, 2, 0).numpy()
        resize = ResizeShortestEdge(size, 1000).get_transform(image)
        for flip in (False, True):
            version = resize.apply_image(image)
            version = (version[:, ::-1] if flip else version).copy()
            raw = copy.deepcopy(model)
            raw.test_nms_thresh, raw.max_detections_per_image = 1.0, 10**6
            x = raw.preprocess_image([{"image": torch.from_numpy(version).permute(2, 0, 1)}])
            features = list(raw.backbone(x.tensor).values())
            found = raw.forward_inference(x, features, raw.head(features))[0]
            b = found.pred_boxes.tensor.clone()
            if flip:
                b[:, [0, 2]] = version.shape[1] - b[:, [2, 0]]
            b[:, [0, 2]] *= width / version.shape[1]
            b[:, [1, 3]] *= height / version.shape[0]
            boxes.append(b)
            scores.append(found.scores)
            classes.append(found.pred_classes)
    boxes, scores, classes = torch.cat(boxes), torch.cat(scores), torch.cat(classes)
    kept = []
    iou = box_iou(boxes, boxes)
    for i in scores.argsort(descending=True).tolist():
        same = [j for j in kept if classes[j] == classes[i]]
        if all(iou[i, j] <= model.test_nms_thresh for j in same):
            kept.append(i)
    kept = kept[: model.max_detections_per_image]
    return boxes[kept], scores[kept], classes[kept]


def test_sizes_and_flips_are_merged_in_the_original_frame():
    sizes = (64, 96)
    cfg, model = detector(min_sizes=sizes, flip=True)
    model.test_score_thresh = 0.06
    given = image_input(333, 441)
    with torch.no_grad():
        boxes, scores, classes = merged_by_hand(model, given, sizes)
    boxes[:, [0, 2]] = boxes[:, [0, 2]].clamp(0, 441)
    boxes[:, [1, 3]] = boxes[:, [1, 3]].clamp(0, 333)
    inside = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(dim=1)
    found = DenseDetectorWithTTA(cfg, model)([given])[0]["instances"]
    assert len(found) > 30
    torch.testing.assert_close(found.scores, scores[inside], rtol=1e-5, atol=1e-6)
    assert torch.equal(found.pred_classes, classes[inside])
    torch.testing.assert_close(found.pred_boxes.tensor, boxes[inside], rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
def test_a_mirrored_image_gives_mirrored_detections(name):
    cfg, model = detector(name, min_sizes=(64,), flip=True)
    given = image_input()
    mirrored = {**given, "image": given["image"].flip(2)}
    a, b = (x["instances"] for x in DenseDetectorWithTTA(cfg, model)([given, mirrored]))
    assert len(a) == len(b) > 10
    turned = b.pred_boxes.tensor.clone()
    turned[:, [0, 2]] = 128 - turned[:, [2, 0]]
    torch.testing.assert_close(a.scores, b.scores, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.pred_boxes.tensor, turned, rtol=1e-4, atol=1e-3)
    # The plain detector does not do so: its convolutions have strides.
    with torch.no_grad():
        c, d = (x["instances"] for x in model([given, mirrored]))
    assert len(c) != len(d) or not torch.allclose(c.scores, d.scores, rtol=1e-3)


def test_an_image_file_is_read_at_its_own_size(tmp_path):
    cfg, model = detector(min_sizes=(64,), flip=True)
    given = image_input()
    file = str(tmp_path / "image.png")
    cv2.imwrite(file, given["image"].permute(1, 2, 0).numpy())
    tta = DenseDetectorWithTTA(cfg, model)
    a, b = (x["instances"] for x in tta([given, {"file_name": file}]))
    assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
    assert len(a) > 10


def test_no_detections_at_all():
    cfg, model = detector(min_sizes=(64, 96), flip=True)
    model.test_score_thresh = 0.999
    found = DenseDetectorWithTTA(cfg, model)([image_input(333, 441)])[0]["instances"]
    assert len(found) == 0
    assert found.image_size == (333, 441)


def test_it_is_evaluated_as_any_model():
    cfg, model = detector()
    model.train()
    wrapped = DenseDetectorWithTTA(cfg, model)
    with inference_context(wrapped):
        assert not model.training
        wrapped([image_input()])
    assert model.training


def test_other_detectors_are_refused():
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        faster_rcnn = build_model(cfg)
    with pytest.raises(UserError, match=r"TEST\.AUG\.ENABLED: GeneralizedRCNN is no dense"):
        DenseDetectorWithTTA(cfg, faster_rcnn)

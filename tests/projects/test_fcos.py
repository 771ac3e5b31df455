"""IoUBalancedFCOS against detectron2's FCOS and the equations; its configs; a toy training."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import instantiate
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.modeling.meta_arch import fcos as detectron2_fcos
from detectron2.utils.events import EventStorage

from iou_balanced_d2.data.checks import _check_num_classes
from iou_balanced_d2.data.demo import DemoSpec, ensure_demo_datasets
from iou_balanced_d2.engine import load_config
from iou_balanced_d2.engine.checkpoint import LossState
from iou_balanced_d2.errors import UserError
from iou_balanced_d2.projects import import_projects
from iou_balanced_d2.projects.fcos import FCOS, IoUBalancedFCOS

from ..command import run
from ..losses import numpy_oracle as oracle
from ..toy import toy_batch, toy_inputs

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "projects/FCOS/configs"
COCO = CONFIGS / "COCO-Detection/fcos_R_50_FPN_1x_iou_balanced.yaml"
K = 3
TINY = (
    "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.DEPTH", 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.NORM", "BN",
    "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.FPN.OUT_CHANNELS", 16,
    "MODEL.FCOS.NUM_CONVS", 1, "MODEL.FCOS.NORM", "", "MODEL.FCOS.NUM_CLASSES", K,
)  # fmt: skip
PLAIN = ("MODEL.IOU_BALANCED.CLS_ETA", 0.0, "MODEL.IOU_BALANCED.LOC_LAMBDA", 0.0)
STOCK = ("MODEL.META_ARCHITECTURE", "FCOS")


def config(*opts, path=COCO):
    return load_config(str(path), [str(word) for word in (*TINY, *opts)])


def tiny_fcos(*opts, trained=True):
    """A seeded FCOS; ``trained``: boxes have an area, as those of a trained one."""
    torch.manual_seed(0)
    model = build_model(config(*opts))
    if trained:
        torch.nn.init.constant_(model.head.bbox_pred.bias, 3.0)
        torch.nn.init.normal_(model.head.bbox_pred.weight, std=0.1)
    return model


def forward_backward(model, batch, steps=1):
    """Losses of the last step, and each parameter's gradient summed over the steps."""
    with EventStorage(0) as storage:
        for _ in range(steps):
            losses = model(copy.deepcopy(batch))
            sum(losses.values()).backward()
            storage.step()
    return losses, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "batch", [toy_batch(), [toy_inputs((), ())], [toy_inputs()]], ids=["two", "empty", "one"]
)
@pytest.mark.parametrize("trained", [True, False])
def test_powers_0_are_detectron2s_fcos(batch, trained):
    stock, ours = tiny_fcos(*STOCK, trained=trained), tiny_fcos(*PLAIN)
    assert type(stock).losses is detectron2_fcos.FCOS.losses
    ours.load_state_dict(stock.state_dict(), strict=True)
    # Three steps, so that the normaliser's moving average is followed too.
    expected, expected_grads = forward_backward(stock, batch, steps=3)
    losses, grads = forward_backward(ours, batch, steps=3)
    assert list(losses) == ["loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr"]
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-6, msg=name)


def test_powers_0_in_float64():
    """As one function of its arguments, beyond float32's digits where it computes in float64."""
    stock, ours = tiny_fcos(*STOCK), tiny_fcos(*PLAIN)
    arguments = loss_arguments(ours, dtype=torch.float64)
    with EventStorage(0):
        expected = stock.losses(*arguments)
    losses = ours.losses(*arguments)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0, check_dtype=False)


def test_normalizer_batch_divides_all_three_losses_by_the_positives():
    ema, batch = tiny_fcos(), tiny_fcos("MODEL.IOU_BALANCED.NORMALIZER", "batch")
    (a, _), (b, _) = (forward_backward(model, toy_batch()) for model in (ema, batch))
    num_pos = int((torch.stack(loss_arguments(ema)[2]) != K).sum())
    start = 0.9 * 300 + 0.1 * num_pos
    for name in a:
        torch.testing.assert_close(b[name] * num_pos, a[name] * start, rtol=1e-5, atol=0)


def loss_arguments(model, dtype=torch.float32):
    """What detectron2 hands to ``losses()`` for the toy batch, with outputs of wide spread."""
    kept = {}

    def keep(*args):
        kept["args"] = args
        return {}

    model = copy.copy(model)
    model.losses = keep
    with EventStorage(0):
        model(toy_batch())
    anchors, logits, labels, deltas, gt, centerness = kept["args"]
    rng = torch.Generator().manual_seed(1)

    def rand(levels, scale):
        return [(torch.rand(x.shape, generator=rng, dtype=dtype)) * scale for x in levels]

    logits = [x - 4 for x in rand(logits, 6)]
    return anchors, logits, labels, rand(deltas, 5), gt, [x - 1 for x in rand(centerness, 2)]


def giou(a, b):
    """Generalised IoU of two boxes, from its definition."""
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return w * h / union - (hull - union) / hull


def oracle_losses(anchors, logits, labels, deltas, gt, centerness, normalizer):
    """The three losses with powers 1.5 and w_loc measured, in NumPy and point by point."""
    stride = np.concatenate([(a.tensor[:, 2] - a.tensor[:, 0]).numpy() for a in anchors])
    point = np.concatenate([a.get_centers().numpy() for a in anchors])
    x, d, c = (torch.cat(v, dim=1).double().numpy() for v in (logits, deltas, centerness))
    labels, gt = torch.stack(labels).numpy(), torch.stack(gt).double().numpy()
    iou, loc, ctr = [], [], 0.0
    for n, r in np.argwhere(labels < K):
        (px, py), box, reach = point[r], gt[n, r], d[n, r] * stride[r]
        pred = np.array([px - reach[0], py - reach[1], px + reach[2], py + reach[3]])
        iou.append(oracle.box_iou(pred, box))
        loc.append(1 - giou(pred, box))
        left, top, right, bottom = px - box[0], py - box[1], box[2] - px, box[3] - py
        target = np.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))
        ctr += target * oracle.sigmoid_ce(c[n, r, 0], 1)
        ctr += (1 - target) * oracle.sigmoid_ce(c[n, r, 0], 0)
    iou, loc, flat = np.array(iou), np.array(loc), labels.reshape(-1)
    weights = oracle.cls_weights(iou, oracle.positive_ce(x.reshape(-1, K), flat), 1.5)
    cls = oracle.focal_sum(x.reshape(-1, K), flat, weights=weights)
    w_loc = loc.sum() / (iou**1.5 * loc).sum()
    box = (w_loc * iou**1.5 * loc).sum()
    losses = {"cls": cls / normalizer, "loc": box / normalizer, "ctr": ctr / normalizer}
    return losses, iou, loc, w_loc


def test_losses_are_the_equations():
    model = tiny_fcos("MODEL.IOU_BALANCED.NORMALIZER", "batch")
    arguments = loss_arguments(model)
    num_pos = int((torch.stack(arguments[2]) != K).sum())
    expected, iou, loc, w_loc = oracle_losses(*arguments, num_pos)
    assert iou.min() < 0.2
    assert iou.max() > 0.6
    losses = model.losses(*arguments)
    for name, value in expected.items():
        np.testing.assert_allclose(losses[f"loss_fcos_{name}"].item(), value, rtol=1e-5)
    measured = model.iou_balanced_loss.w_loc_measurement.w_loc.item()
    np.testing.assert_allclose(measured, w_loc, rtol=1e-5)

    # Kept from then on: with a given w_loc the sum is not that of the plain loss.
    model = tiny_fcos(
        "MODEL.IOU_BALANCED.LOC_WEIGHT", 2.0, "MODEL.IOU_BALANCED.NORMALIZER", "batch"
    )
    box = model.losses(*arguments)["loss_fcos_loc"].item()
    np.testing.assert_allclose(box, (2.0 * iou**1.5 * loc).sum() / num_pos, rtol=1e-5)


@pytest.mark.parametrize("name", ["quality_focal", "varifocal"])
def test_rivals_are_their_equations_and_leave_centerness_alone(name):
    batch_normalizer = ("MODEL.IOU_BALANCED.NORMALIZER", "batch")
    model = tiny_fcos("MODEL.IOU_BALANCED.CLS_LOSS", name, *batch_normalizer)
    arguments = loss_arguments(model)
    _, logits, labels, *_ = arguments
    num_pos = int((torch.stack(labels) != K).sum())
    plain, iou, _, _ = oracle_losses(*arguments, num_pos)
    x, flat = torch.cat(logits, dim=1).double().numpy(), torch.stack(labels).numpy()
    cls = oracle.soft_target_sum(name, x.reshape(-1, K), flat.reshape(-1), iou) / num_pos
    losses = model.losses(*arguments)
    np.testing.assert_allclose(losses["loss_fcos_cls"].item(), cls, rtol=1e-5)
    np.testing.assert_allclose(losses["loss_fcos_ctr"].item(), plain["ctr"], rtol=1e-5)


def test_boxes_that_start_without_area_train_by_the_plain_losses():
    """At IoU 0 eq. 2 is 0/0 and w_loc infinite: the weights are 1 until there is an overlap."""
    model, plain = tiny_fcos(), tiny_fcos(*PLAIN)
    for m in (model, plain):
        torch.nn.init.constant_(m.head.bbox_pred.bias, -1.0)
    losses, grads = forward_backward(model, toy_batch())
    expected, _ = forward_backward(plain, toy_batch())
    torch.testing.assert_close(losses, expected)
    assert model.iou_balanced_loss.w_loc_measurement.w_loc == 0
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    torch.nn.init.constant_(model.head.bbox_pred.bias, 3.0)
    losses, grads = forward_backward(model, toy_batch())
    assert model.iou_balanced_loss.w_loc_measurement.w_loc > 1
    assert all(torch.isfinite(x) for x in losses.values())
    assert all(torch.isfinite(grad).all() for grad in grads.values())


def test_a_fresh_model_and_images_without_objects_give_finite_gradients():
    for batch in (toy_batch(), [toy_inputs((), ())]):
        losses, grads = forward_backward(tiny_fcos(trained=False), batch)
        assert all(torch.isfinite(x) for x in losses.values())
        for name, grad in grads.items():
            assert grad is not None, name
            assert torch.isfinite(grad).all(), name


def test_bfloat16_autocast_trains_in_float32_losses():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, grads = forward_backward(tiny_fcos(), toy_batch())
    assert {x.dtype for x in losses.values()} == {torch.float32}
    assert all(torch.isfinite(grad).all() for grad in grads.values())


def test_state_dict_is_fcos_both_ways_and_the_training_state_is_found():
    stock, ours = tiny_fcos(*STOCK), tiny_fcos()
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict(), strict=True)
    stock.load_state_dict(ours.state_dict(), strict=True)

    forward_backward(ours, toy_batch())
    resumed = tiny_fcos()
    LossState(resumed).load_state_dict(LossState(ours).state_dict())
    assert resumed.iou_balanced_loss.num_pos_ema == ours.iou_balanced_loss.num_pos_ema
    assert (
        resumed.iou_balanced_loss.w_loc_measurement.w_loc
        == ours.iou_balanced_loss.w_loc_measurement.w_loc
        > 1
    )


def test_inference_is_detectron2s_fcos():
    overridden = {
        name
        for name in dir(detectron2_fcos.FCOS)
        if not name.startswith("__")
        and getattr(IoUBalancedFCOS, name) is not getattr(detectron2_fcos.FCOS, name)
    }
    assert overridden == {"losses"}
    assert META_ARCH_REGISTRY.get("FCOS") is FCOS
    stock, ours = tiny_fcos(*STOCK).eval(), tiny_fcos().eval()
    ours.load_state_dict(stock.state_dict())
    with torch.no_grad():
        for model in (stock, ours):
            model.test_score_thresh = 0.0
        a, b = (model([toy_inputs()])[0]["instances"] for model in (stock, ours))
    assert len(a) > 0
    assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
    assert torch.equal(a.scores, b.scores)


def test_the_baseline_is_detectron2s_fcos_config():
    """Model and schedule of detectron2's LazyConfig, which is written in another language."""
    cfg = load_config(str(CONFIGS / "COCO-Detection/fcos_R_50_FPN_1x.yaml"))
    lazy = detectron2_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py")
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        ours, theirs = build_model(cfg), instantiate(lazy.model)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    trained = [{k for k, v in m.named_parameters() if v.requires_grad} for m in (ours, theirs)]
    assert trained[0] == trained[1]
    for name in (
        "num_classes", "head_in_features", "center_sampling_radius", "focal_loss_alpha",
        "focal_loss_gamma", "test_score_thresh", "test_topk_candidates", "test_nms_thresh",
        "max_detections_per_image",
    ):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    assert cfg.MODEL.WEIGHTS == lazy.train.init_checkpoint
    assert cfg.SOLVER.IMS_PER_BATCH == lazy.dataloader.train.total_batch_size
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (lazy.optimizer.lr, lazy.train.max_iter)
    resize = lazy.dataloader.train.mapper.augmentations[0]
    assert list(cfg.INPUT.MIN_SIZE_TRAIN) == list(resize.short_edge_length)


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"did you mean 'MODEL\.FCOS\.NUM_CLASSES'"):
        config("MODEL.FCOS.NUM_CLASES", 4)
    with pytest.raises(UserError, match=r"MODEL\.FCOS\.NUM_CLASSES is 3, .* has 2 classes"):
        _check_num_classes(config(), "mine", ["car", "bus"])
    cfg = config("MODEL.IOU_BALANCED.LOC_WEIGHT_RULE", "anchors")
    with pytest.raises(ValueError, match=r"^MODEL\.IOU_BALANCED\.LOC_WEIGHT_RULE must be first"):
        build_model(cfg)
    for key, value in (("LOC_LAMBDA", 0.0), ("LOC_WEIGHT", 1.5)):  # nothing is measured
        build_model(config("MODEL.IOU_BALANCED.LOC_WEIGHT_RULE", "anchors",
                           f"MODEL.IOU_BALANCED.{key}", value))  # fmt: skip


def test_projects_are_found_and_give_their_keys():
    assert "fcos" in import_projects()
    assert "FCOS" in config().MODEL


@pytest.mark.slow  # 40 s; RetinaNet and SSD are in every run
def test_eight_images_are_learnt_by_heart(tmp_path):
    folder = ensure_demo_datasets(str(tmp_path), DemoSpec(num_train=8, num_val=1))
    data_set = ("eight", str(folder / "annotations/train.json"), str(folder / "train"))
    options = {
        "DATASETS.COCO_JSON": (data_set,),
        "DATASETS.TRAIN": ("eight",),
        "DATASETS.TEST": ("eight",),
        "INPUT.MIN_SIZE_TRAIN": (96,),
        "INPUT.MIN_SIZE_TEST": 96,
        "SOLVER.MAX_ITER": 120,
        "SOLVER.WARMUP_ITERS": 20,
        "SEED": 1,
        "OUTPUT_DIR": "out",
        # AP50 between 80 and 100, or exit code 1.
        "TEST.EXPECTED_RESULTS": [["bbox", "AP50", 90.0, 10.0]],
    }
    words = [str(word) for pair in options.items() for word in pair]
    path = CONFIGS / "Demo/fcos_demo_iou_balanced.yaml"
    code, out, err = run("--config-file", path, *words, cwd=tmp_path, timeout=600)
    assert code == 0, (out + err)[-3000:]
    assert "Results verification passed" in out

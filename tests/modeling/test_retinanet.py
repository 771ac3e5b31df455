"""IoUBalancedRetinaNet against detectron2's RetinaNet: the same but for the losses."""

import copy
from dataclasses import asdict

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import RetinaNet
from detectron2.utils.events import EventStorage

from iou_balanced_d2 import add_iou_balanced_config
from iou_balanced_d2.losses import LossOptions
from iou_balanced_d2.modeling import IoUBalancedRetinaNet

from ..toy import toy_batch, toy_inputs, toy_model

PLAIN = ("MODEL.IOU_BALANCED.CLS_ETA", 0.0, "MODEL.IOU_BALANCED.LOC_LAMBDA", 0.0)
STOCK = ("MODEL.META_ARCHITECTURE", "RetinaNet")


def losses_and_gradients(model, batch, steps=1):
    """Losses of the last step, and each parameter's gradient summed over the steps."""
    with EventStorage(0) as storage:
        for _ in range(steps):
            losses = model(copy.deepcopy(batch))
            sum(losses.values()).backward()
            storage.step()
    return losses, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("box_loss", ["smooth_l1", "giou", "diou", "ciou"])
def test_powers_0_are_stock_retinanet(box_loss):
    opts = ("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", box_loss)
    stock = toy_model(*STOCK, *opts)
    ours = toy_model(*PLAIN, *opts)
    assert type(stock) is RetinaNet
    ours.load_state_dict(stock.state_dict(), strict=True)
    batch = toy_batch()
    anchors = stock.anchor_generator(
        [torch.zeros(1, 1, s, t) for s, t in ((12, 16), (6, 8), (3, 4), (2, 2), (1, 1))]
    )
    labels, _ = stock.label_anchors(anchors, [x["instances"] for x in batch])
    assert any((x == -1).any() for x in labels), "the batch must have ignored anchors"

    # Three steps, so that the normaliser's moving average is followed too.
    expected, expected_grads = losses_and_gradients(stock, batch, steps=3)
    losses, grads = losses_and_gradients(ours, batch, steps=3)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-5, atol=1e-7, msg=name)


def test_powers_change_only_the_loss_they_belong_to():
    batch = toy_batch()
    plain = losses_and_gradients(toy_model(*PLAIN), batch)[0]
    # At the first step both losses keep their sums, so it is the gradients that tell.
    first = ("MODEL.IOU_BALANCED.LOC_WEIGHT_RULE", "first")
    cls = losses_and_gradients(toy_model("MODEL.IOU_BALANCED.LOC_LAMBDA", 0.0), batch)
    loc = losses_and_gradients(toy_model("MODEL.IOU_BALANCED.CLS_ETA", 0.0, *first), batch)
    plain_grads = losses_and_gradients(toy_model(*PLAIN), batch)[1]
    for losses, grads, changed, same in (
        (*cls, "head.cls_score.weight", "head.bbox_pred.weight"),
        (*loc, "head.bbox_pred.weight", "head.cls_score.weight"),
    ):
        torch.testing.assert_close(losses, plain, rtol=1e-5, atol=0)
        torch.testing.assert_close(grads[same], plain_grads[same])
        assert not torch.allclose(grads[changed], plain_grads[changed], rtol=1e-3)


def test_state_dict_is_stock_retinanets_both_ways():
    stock, ours = toy_model(*STOCK), toy_model()
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict(), strict=True)
    stock.load_state_dict(ours.state_dict(), strict=True)


def test_inference_is_stock_retinanets():
    overridden = set(vars(IoUBalancedRetinaNet)) & set(dir(RetinaNet))
    ours = {name for name in overridden if not name.startswith("__")}
    assert ours == {"from_config", "label_anchors", "losses"}
    stock, model = toy_model(*STOCK).eval(), toy_model().eval()
    model.load_state_dict(stock.state_dict())
    with torch.no_grad():
        for m in (stock, model):
            m.test_score_thresh = 0.0
        a, b = (m([toy_inputs()])[0]["instances"] for m in (stock, model))
    assert len(a) > 0
    assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
    assert torch.equal(a.scores, b.scores)


def test_images_without_objects_give_every_parameter_a_finite_gradient():
    losses, grads = losses_and_gradients(toy_model(), [toy_inputs((), ())])
    assert losses["loss_box_reg"] == 0
    for name, grad in grads.items():
        assert grad is not None, name
        assert torch.isfinite(grad).all(), name


def test_bfloat16_autocast_trains_in_float32_losses():
    model = toy_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, grads = losses_and_gradients(model, toy_batch())
    assert {x.dtype for x in losses.values()} == {torch.float32}
    assert all(torch.isfinite(g).all() for g in grads.values())


def test_hyper_parameters_come_from_the_config_under_the_same_name():
    loss = toy_model(
        "MODEL.IOU_BALANCED.CLS_ETA", 0.7, "MODEL.IOU_BALANCED.LOC_WEIGHT", 3.049,
        "MODEL.IOU_BALANCED.NORMALIZER", "batch", "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", 0.2,
    ).iou_balanced_loss  # fmt: skip
    assert loss.options == LossOptions(cls_eta=0.7, loc_weight=3.049, normalizer="batch")
    assert (loss.w_loc_measurement.w_loc, loss.smooth_l1_beta) == (3.049, 0.2)


def test_every_option_is_a_key_with_its_default():
    plain = get_cfg()
    add_iou_balanced_config(plain)
    keys = {key.lower(): value for key, value in plain.MODEL.IOU_BALANCED.items()}
    assert keys == asdict(LossOptions())


def test_model_can_be_scripted():
    from detectron2.export import scripting_with_instances
    from detectron2.structures import Boxes

    model = toy_model().eval()
    fields = {"pred_boxes": Boxes, "scores": torch.Tensor, "pred_classes": torch.Tensor}
    scripting_with_instances(model, fields)

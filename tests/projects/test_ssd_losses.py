"""SSD's losses: against torchvision's, against NumPy from the equations, and in corner cases."""

import numpy as np
import pytest
import torch
import torchvision
from detectron2.utils.events import EventStorage
from torchvision.models.detection.ssd import SSD as TorchvisionSSD

from iou_balanced_d2.engine.checkpoint import LossState
from iou_balanced_d2.projects.ssd.losses import hard_negatives

from ..toy import toy_inputs
from .ssd_toy import NUM_CLASSES, toy_model

K = NUM_CLASSES
BALANCED = ("MODEL.META_ARCHITECTURE", "IoUBalancedSSD")
PLAIN = ("MODEL.META_ARCHITECTURE", "SSD")
# What the equations can be checked with: w_loc of the predicted boxes.
FIRST = ("MODEL.IOU_BALANCED.LOC_WEIGHT_RULE", "first")


def image(boxes=(), classes=(), seed=0):
    return toy_inputs(boxes, classes, size=(128, 128), seed=seed)


def batch():
    """Three images: two objects, five, none."""
    few = image(((10, 12, 60, 70), (64, 40, 120, 90)), (0, 2))
    rng = np.random.default_rng(5)
    corner = rng.uniform(0, 80, (5, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(12, 46, (5, 2))], axis=1)
    return [few, image(boxes.tolist(), (0, 1, 2, 1, 1), seed=1), image(seed=2)]


def step(model, inputs):
    model.zero_grad()
    with EventStorage():
        losses = model(inputs)
    sum(losses.values()).backward()
    return {name: float(value.detach()) for name, value in losses.items()}, {
        name: p.grad.clone() for name, p in model.named_parameters()
    }


def arguments_of_losses(model, inputs):
    """What ``losses()`` is called with."""
    seen = []
    model.losses = lambda *args: seen.extend(args) or {}
    try:
        model(inputs)
    finally:
        del model.losses
    return seen


def torchvisions_losses(model, inputs):
    """torchvision's SSD.compute_loss on the same predictions, matched by torchvision."""
    anchors, logits, _, deltas, _ = arguments_of_losses(model, inputs)
    boxes = torch.cat([a.tensor for a in anchors])
    theirs = TorchvisionSSD(torch.nn.Identity(), None, (128, 128), K + 1, head=torch.nn.Identity())
    targets = [
        {"boxes": x["instances"].gt_boxes.tensor, "labels": x["instances"].gt_classes + 1}
        for x in inputs
    ]
    matched = [
        theirs.proposal_matcher(torchvision.ops.box_iou(t["boxes"], boxes))
        if len(t["boxes"])
        else torch.full((len(boxes),), -1)
        for t in targets
    ]
    background_first = torch.cat(logits, dim=1)[:, :, [K, *range(K)]]
    outputs = {"bbox_regression": torch.cat(deltas, dim=1), "cls_logits": background_first}
    losses = theirs.compute_loss(targets, outputs, [boxes] * len(inputs), matched)
    return {"loss_cls": losses["classification"], "loss_box_reg": losses["bbox_regression"]}


@pytest.mark.parametrize("scope", [None, "image", "batch", "level", "global"])
def test_powers_of_0_are_torchvisions_losses_with_their_gradients(scope):
    """Of plain SSD (None), and of the IoU-balanced one with each scope of eq. 2."""
    powers = ("MODEL.IOU_BALANCED.CLS_ETA", 0.0, "MODEL.IOU_BALANCED.LOC_LAMBDA", 0.0)
    scoped = (*BALANCED, *powers, "MODEL.IOU_BALANCED.CLS_NORM_SCOPE", scope)
    model = toy_model(*(scoped if scope else PLAIN))
    ours, gradients = step(model, batch())
    model.zero_grad()
    theirs = torchvisions_losses(model, batch())
    sum(theirs.values()).backward()
    for name, value in theirs.items():
        assert ours[name] == pytest.approx(float(value.detach()), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-4, atol=1e-6)


def numpy_losses(anchors, logits, gt_labels, deltas, gt_boxes, *, power=1.5, ratio=3):
    """Eq. 1 to 4 image by image, in float64; w_loc from this step."""
    anchor = np.concatenate([a.tensor.numpy() for a in anchors]).astype(float)
    logits, deltas = (torch.cat(x, dim=1).detach().numpy().astype(float) for x in (logits, deltas))
    cls_sum, loc_terms, loc_ious = 0.0, [], []
    for i in range(len(gt_labels)):
        label, gt = gt_labels[i].numpy(), gt_boxes[i].numpy().astype(float)
        shifted = np.exp(logits[i] - logits[i].max(axis=1, keepdims=True))
        probability = shifted / shifted.sum(axis=1, keepdims=True)
        ce = -np.log(probability[np.arange(len(label)), label])
        p = np.flatnonzero(label != K)
        iou = decoded_iou(anchor[p], deltas[i][p], gt[p])
        weight = iou**power
        if len(p):
            weight *= ce[p].sum() / (weight * ce[p]).sum()
        hard = np.sort(ce[label == K])[::-1][: ratio * len(p)]
        cls_sum += (weight * ce[p]).sum() + hard.sum()
        loc_terms.append(smooth_l1(anchor[p], deltas[i][p], gt[p]))
        loc_ious.append(iou)
    loc, iou = np.concatenate(loc_terms), np.concatenate(loc_ious)
    w_loc = loc.sum() / (iou**power * loc).sum()
    num = max(len(loc), 1)
    weighted = {"loss_cls": cls_sum / num, "loss_box_reg": (w_loc * iou**power * loc).sum() / num}
    return weighted, w_loc


def center_size(boxes):
    return (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]


def decoded_iou(anchor, delta, gt):
    center, size = center_size(anchor)
    center = center + delta[:, :2] * 0.1 * size
    size = size * np.exp(delta[:, 2:] * 0.2)
    box = np.concatenate([center - size / 2, center + size / 2], axis=1)
    low, high = np.maximum(box[:, :2], gt[:, :2]), np.minimum(box[:, 2:], gt[:, 2:])
    shared = (high - low).clip(0).prod(1)
    return shared / (size.prod(1) + (gt[:, 2:] - gt[:, :2]).prod(1) - shared)


def box_target(anchor, gt):
    (center, size), (gt_center, gt_size) = center_size(anchor), center_size(gt)
    return np.concatenate([(gt_center - center) / size / 0.1, np.log(gt_size / size) / 0.2], axis=1)


def smooth_l1(anchor, delta, gt):
    d = np.abs(delta - box_target(anchor, gt))
    return np.where(d < 1, d**2 / 2, d - 0.5).sum(axis=1)


def test_iou_balanced_losses_are_the_equations():
    model = toy_model(*BALANCED, *FIRST)
    expected, w_loc = numpy_losses(*arguments_of_losses(model, batch()))
    losses, _ = step(model, batch())
    assert losses == pytest.approx(expected, rel=1e-5)
    assert float(model.iou_balanced_loss.w_loc_measurement.w_loc) == pytest.approx(w_loc, rel=1e-5)
    # Eq. 2 keeps the sum of the positives' loss, w_loc as measured here that of the box loss.
    plain = toy_model(*PLAIN)
    assert losses == pytest.approx(step(plain, batch())[0], rel=1e-5)
    # Kept: after the boxes have changed, the sums differ.
    with torch.no_grad():
        for conv in model.head.bbox_pred:
            conv.weight.mul_(0.5)
    balanced, _ = numpy_losses(*arguments_of_losses(model, batch()))
    again, _ = step(model, batch())
    assert again["loss_cls"] == pytest.approx(balanced["loss_cls"], rel=1e-5)
    assert again["loss_box_reg"] != pytest.approx(balanced["loss_box_reg"], rel=1e-3)


def test_each_positive_has_the_weight_of_eq_2_and_4():
    """By gradients: that of CE is softmax - one-hot, and sums alone would not show the weights."""
    model = toy_model(*BALANCED, *FIRST)
    anchors, logits, gt_labels, deltas, gt_boxes = arguments_of_losses(model, batch())
    logits, deltas = ([x.detach().requires_grad_() for x in xs] for xs in (logits, deltas))
    with EventStorage():
        losses = model.losses(anchors, logits, gt_labels, deltas, gt_boxes)
    sum(losses.values()).backward()
    logit_gradient, delta_gradient = (
        torch.cat([x.grad for x in xs], dim=1).numpy() for xs in (logits, deltas)
    )
    _, w_loc = numpy_losses(anchors, logits, gt_labels, deltas, gt_boxes)
    anchor = np.concatenate([a.tensor.numpy() for a in anchors]).astype(float)
    probability = torch.cat(logits, dim=1).detach().double().softmax(dim=2).numpy()
    delta = torch.cat(deltas, dim=1).detach().double().numpy()
    num = sum(int((label != K).sum()) for label in gt_labels)
    for i, (label, gt) in enumerate(zip(gt_labels, gt_boxes, strict=True)):
        p = np.flatnonzero(label.numpy() != K)
        q, classes, target = probability[i][p], label.numpy()[p], gt.numpy()[p].astype(float)
        powered = decoded_iou(anchor[p], delta[i][p], target) ** 1.5
        ce = -np.log(q[np.arange(len(p)), classes])
        weight = powered * ce.sum() / (powered * ce).sum() if len(p) else powered
        expected = weight[:, None] * (q - np.eye(K + 1)[classes]) / num
        np.testing.assert_allclose(logit_gradient[i][p], expected, rtol=1e-4, atol=1e-7)
        error = delta[i][p] - box_target(anchor[p], target)
        expected = w_loc * powered[:, None] * error.clip(-1, 1) / num
        np.testing.assert_allclose(delta_gradient[i][p], expected, rtol=1e-4, atol=1e-6)


def test_scopes_differ():
    """Gradients, as all scopes keep the sum."""
    gradients = []
    for scope in ("image", "batch"):
        model = toy_model(*BALANCED, "MODEL.IOU_BALANCED.CLS_NORM_SCOPE", scope)
        gradients.append(step(model, batch())[1]["head.cls_score.0.weight"])
    assert not torch.allclose(*gradients, rtol=1e-3)


def test_weights_leave_the_mining_alone():
    """The hard negatives with weighted positives are those without."""
    generator = torch.Generator().manual_seed(0)
    loss = torch.rand(4, 50, generator=generator)
    labels = torch.randint(0, 20, (4, 50), generator=generator).clamp(max=K)
    labels[:, 0], labels[3] = -1, K
    loss[:, 0] = 9.0
    weighted = torch.where(labels < K, loss * 100, loss)
    hard = hard_negatives(loss, labels, K, 3.0)
    assert hard.equal(hard_negatives(weighted, labels, K, 3.0) & (labels == K))
    for i in range(4):
        negatives = loss[i][labels[i] == K]
        wanted = min(len(negatives), 3 * int(((labels[i] >= 0) & (labels[i] < K)).sum()))
        expected = negatives.sort(descending=True).values[:wanted]
        torch.testing.assert_close(loss[i][hard[i]].sort(descending=True).values, expected)
    assert not hard[3].any()


@pytest.mark.parametrize("architecture", ["SSD", "IoUBalancedSSD"])
def test_images_without_objects_give_finite_losses_and_gradients(architecture):
    model = toy_model("MODEL.META_ARCHITECTURE", architecture)
    losses, gradients = step(model, [image(), image(seed=1)])
    assert losses == {"loss_cls": 0.0, "loss_box_reg": 0.0}
    assert len(gradients) == len(list(model.parameters()))
    assert all(torch.isfinite(g).all() for g in gradients.values())
    step(model, batch())  # and goes on


def test_training_state_is_saved_and_resumed():
    model = toy_model(*BALANCED)
    step(model, batch())
    state = LossState(model).state_dict()
    fresh = toy_model(*BALANCED)
    LossState(fresh).load_state_dict(state)
    w_loc = fresh.iou_balanced_loss.w_loc_measurement.w_loc
    assert w_loc > 1
    assert w_loc == model.iou_balanced_loss.w_loc_measurement.w_loc


def test_w_loc_of_ones_own():
    model = toy_model(*BALANCED, "MODEL.IOU_BALANCED.LOC_WEIGHT", 2.0)
    anchors_on = toy_model(*BALANCED, "MODEL.IOU_BALANCED.LOC_WEIGHT", 1.0)
    twice, once = (step(m, batch())[0]["loss_box_reg"] for m in (model, anchors_on))
    assert twice == pytest.approx(2 * once, rel=1e-6)


def test_the_rivals_of_the_sigmoid_are_refused():
    options = ("MODEL.IOU_BALANCED.CLS_LOSS", "varifocal")
    with pytest.raises(ValueError, match=r"^MODEL\.IOU_BALANCED\.CLS_LOSS must be .*softmax"):
        toy_model(*BALANCED, *options)

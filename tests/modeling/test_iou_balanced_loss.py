"""IoUBalancedLoss on synthetic predictions: every mode against NumPy, its state, its extremes."""

import logging
from dataclasses import fields

import numpy as np
import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from iou_balanced_d2.losses import LossOptions
from iou_balanced_d2.modeling import IoUBalancedLoss

from ..losses import numpy_oracle as oracle

K, LEVEL_SIZES, NUM_IMAGES = 3, (12, 6), 2
EMA_AFTER_ONE = 0.9 * 100


def make_batch(seed=0, num_images=NUM_IMAGES, dtype=torch.float64, spread=0.3):
    """Arguments of ``losses()``: anchors, logits, labels, deltas, boxes; boxes near anchors."""
    rng = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=rng, dtype=dtype)

    def boxes(n):
        xy = rand(n, 2) * 100
        return torch.cat([xy, xy + 10 + rand(n, 2) * 50], dim=1)

    anchors = [Boxes(boxes(size).float()) for size in LEVEL_SIZES]
    flat = Boxes.cat(anchors).tensor
    num_anchors = len(flat)
    logits = [((rand(num_images, s, K) - 0.5) * 6).requires_grad_() for s in LEVEL_SIZES]
    deltas = [((rand(num_images, s, 4) - 0.5) * spread).requires_grad_() for s in LEVEL_SIZES]
    labels = [torch.randint(-1, K + 1, (num_anchors,), generator=rng) for _ in range(num_images)]
    # Ground truth shifted and stretched by up to a fifth of the anchor, so IoUs spread widely.
    size = (flat[:, 2:] - flat[:, :2]).repeat(1, 2)
    gt = [(flat + (rand(num_anchors, 4) - 0.5) * 0.4 * size).float() for _ in range(num_images)]
    return anchors, logits, labels, deltas, gt


def make_loss(**kwargs):
    """The module of K classes; arguments are options, or the module's own."""
    names = {field.name for field in fields(LossOptions)}
    # What the equations can be checked with: w_loc of the predicted boxes of the first step.
    options = {"loc_weight_rule": "first", "loc_weight_steps": 1}
    options |= {name: value for name, value in kwargs.items() if name in names}
    return IoUBalancedLoss(
        num_classes=K,
        box2box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
        options=LossOptions(**options),
        **{name: value for name, value in kwargs.items() if name not in names},
    )


def to_numpy(batch):
    anchors, logits, labels, deltas, gt = batch
    return (
        [a.tensor.double().numpy() for a in anchors],
        [x.detach().double().numpy() for x in logits],
        torch.stack(labels).numpy(),
        [x.detach().double().numpy() for x in deltas],
        torch.stack(gt).double().numpy(),
    )


def num_positives(batch):
    labels = torch.stack(batch[2])
    return int(((labels >= 0) & (labels < K)).sum())


@pytest.mark.parametrize("scope", ["batch", "level", "image"])
@pytest.mark.parametrize(("eta", "lambda_", "w_loc"), [(1.5, 1.5, 0.0), (0.5, 1.8, 3.049)])
def test_losses_are_the_equations(scope, eta, lambda_, w_loc):
    batch = make_batch()
    module = make_loss(cls_eta=eta, cls_norm_scope=scope, loc_lambda=lambda_, loc_weight=w_loc)
    losses = module(*batch)
    normalizer = EMA_AFTER_ONE + 0.1 * num_positives(batch)
    cls, box, _, expected_w_loc = oracle.detector_losses(
        *to_numpy(batch), eta=eta, lambda_=lambda_, w_loc=w_loc or None, normalizer=normalizer,
        scope=scope,
    )  # fmt: skip
    np.testing.assert_allclose(losses["loss_cls"].item(), cls, rtol=1e-5)
    np.testing.assert_allclose(losses["loss_box_reg"].item(), box, rtol=1e-5)
    np.testing.assert_allclose(module.w_loc_measurement.w_loc.item(), expected_w_loc, rtol=1e-5)


@pytest.mark.parametrize("name", ["quality_focal", "varifocal"])
@pytest.mark.parametrize("lambda_", [0.0, 1.5])
def test_rivals_are_their_equations_with_either_box_loss(name, lambda_):
    batch = make_batch()
    # What the rivals do not read is set to what would show.
    module = make_loss(
        cls_loss=name, loc_lambda=lambda_, normalizer="batch", cls_eta=3.0, cls_norm_scope="image",
        focal_loss_alpha=0.9, focal_loss_gamma=5.0,
    )  # fmt: skip
    with EventStorage(0) as storage:
        for _ in range(20):
            losses = module(*batch)
            storage.step()
        assert storage.latest()["iou_balanced/cls_scale"][0] == 1
    num = num_positives(batch)
    _, box, iou, _ = oracle.detector_losses(
        *to_numpy(batch), eta=0.0, lambda_=lambda_, w_loc=None, normalizer=num
    )
    _, logits, labels, *_ = to_numpy(batch)
    flat = np.concatenate(logits, axis=1).reshape(-1, K)
    cls = oracle.soft_target_sum(name, flat, labels.reshape(-1), iou) / num
    np.testing.assert_allclose(losses["loss_cls"].item(), cls, rtol=1e-5)
    np.testing.assert_allclose(losses["loss_box_reg"].item(), box, rtol=1e-5)
    losses["loss_cls"].backward()
    assert all(x.grad is None for x in batch[3]), "no gradient by way of the IoU"


def constant_weight_loss(arrays, logits, deltas, w_loc):
    """The sum of both losses as a function of predictions, the weights fixed at ``arrays``."""
    anchors, logits_here, labels, deltas_here, gt = arrays
    flat = np.concatenate(anchors)
    x, here = np.concatenate(logits, axis=1), np.concatenate(logits_here, axis=1)
    d, d_here = np.concatenate(deltas, axis=1), np.concatenate(deltas_here, axis=1)
    rows = np.argwhere((labels >= 0) & (labels < K))
    iou = np.array(
        [oracle.box_iou(oracle.decode(d_here[n, r], flat[r]), gt[n, r]) for n, r in rows]
    )
    ce = [oracle.focal(here[n, r, labels[n, r]], 1, 0.25, 2.0) for n, r in rows]
    weights = oracle.cls_weights(iou, ce, 1.5)
    cls = oracle.focal_sum(x.reshape(-1, K), labels.reshape(-1), weights=weights)
    target = [oracle.encode(gt[n, r], flat[r]) for n, r in rows]
    loc = oracle.loc_loss([d[n, r] for n, r in rows], target, 0.11)
    return cls + (w_loc * iou**1.5 * loc).sum()


@pytest.mark.parametrize(
    ("level", "index"), [(0, (0, 3, 1)), (0, (1, 7, 0)), (1, (0, 2, 2)), (1, (1, 5, 0))]
)
@pytest.mark.parametrize("which", ["logits", "deltas"])
def test_gradients_are_those_of_constant_weights(level, index, which):
    batch = make_batch()
    losses = make_loss(loc_weight=2.34, normalizer="batch")(*batch)
    sum(losses.values()).backward()
    arrays = to_numpy(batch)

    def loss_at(step):
        predictions = {"logits": arrays[1], "deltas": arrays[3]}
        predictions[which] = [a.copy() for a in predictions[which]]
        predictions[which][level][index] += step
        return constant_weight_loss(arrays, w_loc=2.34, **predictions) / num_positives(batch)

    numeric = (loss_at(1e-6) - loss_at(-1e-6)) / 2e-6
    tensor = batch[1 if which == "logits" else 3][level]
    np.testing.assert_allclose(tensor.grad[index].item(), numeric, rtol=1e-4, atol=1e-8)


def test_w_loc_is_measured_once_and_kept(caplog):
    module = make_loss(normalizer="batch")
    with caplog.at_level(logging.INFO, logger="iou_balanced_d2"):
        module(*make_batch(seed=0))
        first = module.w_loc_measurement.w_loc.item()
        module(*make_batch(seed=1))
    assert module.w_loc_measurement.w_loc.item() == first > 1
    assert caplog.text.count("w_loc measured") == 1
    fixed = make_loss(loc_weight=2.0)
    fixed(*make_batch(seed=0))
    assert fixed.w_loc_measurement.w_loc.item() == 2.0


def test_w_loc_waits_for_positives_and_for_boxes_that_overlap():
    module = make_loss(normalizer="batch")
    anchors, logits, labels, deltas, gt = make_batch()
    background = [torch.full_like(x, K) for x in labels]
    losses = module(anchors, logits, background, deltas, gt)
    assert module.w_loc_measurement.w_loc == 0
    assert losses["loss_box_reg"] == 0
    far = [box + 1000 for box in gt]
    losses = module(anchors, logits, labels, deltas, far)
    assert module.w_loc_measurement.w_loc == 0
    plain = make_loss(normalizer="batch", loc_lambda=0.0, cls_eta=0.0)
    expected = plain(anchors, logits, labels, deltas, far)
    torch.testing.assert_close(losses["loss_box_reg"], expected["loss_box_reg"])
    torch.testing.assert_close(losses["loss_cls"], expected["loss_cls"])
    module(anchors, logits, labels, deltas, gt)
    assert module.w_loc_measurement.w_loc > 1


def test_state_stands_still_without_gradients_and_is_resumed():
    module = make_loss()
    with torch.no_grad():
        module(*make_batch())
    assert module.w_loc_measurement.w_loc == 0
    assert module.num_pos_ema == 100
    module(*make_batch())
    state = module.training_state()
    assert state["w_loc_measurement"]["w_loc"] > 1
    assert state["num_pos_ema"] != 100
    resumed = make_loss()
    resumed.load_training_state(state)
    torch.testing.assert_close(resumed(*make_batch(seed=1)), module(*make_batch(seed=1)))
    assert len(module.state_dict()) == 0, "training state is no weight"
    fixed = make_loss(loc_weight=2.0)
    fixed.load_training_state(state)
    assert fixed.w_loc_measurement.w_loc == 2.0, "a value the user sets holds also over a resume"


def test_normalizer_is_detectron2s_moving_average():
    module = make_loss()
    expected = 100.0
    for seed in range(5):
        batch = make_batch(seed)
        module(*batch)
        expected = 0.9 * expected + 0.1 * max(num_positives(batch), 1)
    np.testing.assert_allclose(module.num_pos_ema.item(), expected, rtol=1e-12)


@pytest.mark.parametrize("scope", ["batch", "level", "image", "global"])
def test_without_positives_every_prediction_gets_a_finite_gradient(scope):
    anchors, logits, labels, deltas, gt = make_batch()
    background = [torch.full_like(x, K) for x in labels]
    losses = make_loss(cls_norm_scope=scope)(anchors, logits, background, deltas, gt)
    sum(losses.values()).backward()
    assert losses["loss_cls"] > 0
    assert losses["loss_box_reg"] == 0
    assert all(torch.isfinite(x.grad).all() for x in (*logits, *deltas))


@pytest.mark.parametrize("box_loss", ["smooth_l1", "giou", "diou", "ciou"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_diverged_deltas_leave_the_other_loss_and_the_state_alone(box_loss, value):
    anchors, logits, labels, deltas, gt = make_batch()
    broken = [d.detach().clone() for d in deltas]
    for d in broken:
        d[0] = value
    module = make_loss(box_reg_loss_type=box_loss)
    losses = module(anchors, logits, labels, [d.requires_grad_() for d in broken], gt)
    assert not torch.isfinite(losses["loss_box_reg"]), "reported under its own name"
    assert torch.isfinite(losses["loss_cls"])
    assert module.w_loc_measurement.w_loc == 0
    assert torch.isfinite(module.num_pos_ema)


@pytest.mark.parametrize("box_loss", ["smooth_l1", "giou", "diou", "ciou"])
def test_boxes_without_height_have_a_finite_gradient(box_loss):
    anchors, logits, labels, deltas, gt = make_batch()
    flat = [d.detach().clone() for d in deltas]
    for d in flat:
        d[..., 3] = -30.0
        d.requires_grad_()
    sum(
        make_loss(box_reg_loss_type=box_loss)(anchors, logits, labels, flat, gt).values()
    ).backward()
    assert all(torch.isfinite(d.grad).all() for d in flat)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_arithmetic_is_float32_for_half_precision_predictions(dtype):
    anchors, logits, labels, deltas, gt = make_batch(dtype=torch.float32)
    half = [[x.detach().to(dtype) for x in xs] for xs in (logits, deltas)]
    exact = [[x.float() for x in xs] for xs in half]
    got = make_loss()(anchors, half[0], labels, half[1], gt)
    expected = make_loss()(anchors, exact[0], labels, exact[1], gt)
    assert {x.dtype for x in got.values()} == {torch.float32}
    torch.testing.assert_close(got, expected)


def test_scalars_are_logged_under_the_keys_names():
    module = make_loss()
    with EventStorage(0) as storage:
        for _ in range(20):
            module(*make_batch())
            storage.step()
        latest = {name: value for name, (value, _) in storage.latest().items()}
    *_, iou, w_loc = oracle.detector_losses(
        *to_numpy(make_batch()), eta=1.5, lambda_=1.5, w_loc=None, normalizer=1.0
    )
    np.testing.assert_allclose(latest["iou_balanced/mean_pos_iou"], iou.mean(), rtol=1e-5)
    np.testing.assert_allclose(latest["iou_balanced/w_loc"], w_loc, rtol=1e-5)
    assert latest["iou_balanced/cls_scale"] > 1
    assert latest["num_pos_anchors"] == num_positives(make_batch()) / NUM_IMAGES


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cls_loss", "l7"),
        ("cls_eta", -1.0),
        ("cls_eta", "1.5"),
        ("loc_lambda", float("nan")),
        ("loc_weight", -0.1),
        ("loc_weight_rule", "warmup"),
        ("loc_weight_steps", 0),
        ("cls_norm_scope", "galaxy"),
        ("cls_loss_weight", -1.0),
        ("bbox_reg_loss_weight", float("inf")),
        ("normalizer", "none"),
    ],
)
def test_bad_options_are_named_by_their_key(name, value):
    with pytest.raises(ValueError, match=f"^MODEL.IOU_BALANCED.{name.upper()} must be"):
        LossOptions(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FOCAL_LOSS_ALPHA", 1.5),
        ("FOCAL_LOSS_ALPHA", float("nan")),
        ("FOCAL_LOSS_GAMMA", -0.5),
        ("SMOOTH_L1_LOSS_BETA", -0.1),
        ("BBOX_REG_LOSS_TYPE", "l7"),
    ],
)
def test_bad_keys_of_the_plain_losses_are_named(name, value):
    argument = name.lower().replace("l1_loss", "l1").replace("bbox", "box")
    with pytest.raises(ValueError, match=f"^{name} must be"):
        make_loss(**{argument: value})


def test_the_edges_of_the_plain_losses_keys_are_accepted():
    make_loss(focal_loss_alpha=-1.0)
    make_loss(focal_loss_gamma=0.0, smooth_l1_beta=0.0)


def test_labels_above_the_number_of_classes_are_one_clear_error():
    anchors, logits, labels, deltas, gt = make_batch()
    labels[1][3] = K + 1
    with pytest.raises(ValueError, match=rf"label {K + 1} .* MODEL\.RETINANET\.NUM_CLASSES.* {K}"):
        make_loss()(anchors, logits, labels, deltas, gt)


def test_logits_of_other_classes_are_one_clear_error():
    anchors, logits, labels, deltas, gt = make_batch()
    wide = [torch.cat([x, x[..., :1]], dim=2) for x in logits]
    with pytest.raises(ValueError, match=rf"expected logits of {K} columns, got \[{K + 1}, "):
        make_loss()(anchors, wide, labels, deltas, gt)


def test_scalars_are_numbers_where_no_box_overlaps():
    module = make_loss()
    anchors, logits, labels, deltas, gt = make_batch()
    with EventStorage(19) as storage:
        module(anchors, logits, labels, deltas, [box + 1000 for box in gt])
        latest = {name: value for name, (value, _) in storage.latest().items()}
    assert latest["iou_balanced/cls_scale"] == latest["iou_balanced/loc_mean_weight"] == 1


def test_loss_weights_are_factors_of_the_whole_losses():
    weighted = make_loss(cls_loss_weight=0.5, bbox_reg_loss_weight=3.0)(*make_batch())
    once = make_loss()(*make_batch())
    torch.testing.assert_close(weighted["loss_cls"], 0.5 * once["loss_cls"])
    torch.testing.assert_close(weighted["loss_box_reg"], 3 * once["loss_box_reg"])


def test_a_constant_times_the_plain_box_loss_can_be_had_as_a_control():
    control = make_loss(loc_lambda=0.0, loc_weight=1.08)(*make_batch())
    plain = make_loss(loc_lambda=0.0)(*make_batch())
    torch.testing.assert_close(control["loss_box_reg"], 1.08 * plain["loss_box_reg"])


def test_extra_losses_are_those_of_the_positives_divided_by_the_same_number():
    def extra(positives, anchor, gt):
        return {"loss_extra": (anchor - gt).abs().sum() * 0 + positives.num}

    losses = make_loss(normalizer="batch")(*make_batch(), extra)
    assert list(losses) == ["loss_cls", "loss_box_reg", "loss_extra"]
    assert losses["loss_extra"] == 1


@pytest.mark.parametrize("box_loss", ["smooth_l1", "giou"])
def test_a_batch_of_no_images_has_a_loss_of_0_with_a_gradient(box_loss):
    batch = make_batch(num_images=0, dtype=torch.float32)
    with EventStorage(0):
        losses = make_loss(box_reg_loss_type=box_loss)(*batch)
    sum(losses.values()).backward()
    assert all(x == 0 for x in losses.values())
    assert all(x.grad.shape == x.shape for x in (*batch[1], *batch[3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_batches_before_one_backward_pass(dtype):
    """As with micro-batches; ``.float()`` and ``.double()`` cast the average of positives."""
    module = make_loss().to(dtype)
    total = 0.0
    for seed in (0, 1):
        total += sum(module(*make_batch(seed, dtype=dtype)).values())
    total.backward()

"""The rules by which w_loc is measured, each against sums taken by NumPy."""

import logging

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage

from iou_balanced_d2.losses import LossOptions
from iou_balanced_d2.modeling.w_loc import WLocMeasurement

from ..losses import numpy_oracle as oracle
from .test_iou_balanced_loss import K, make_batch, make_loss, to_numpy

LAMBDA = 1.5


def sums_of(batch, at_anchors=False):
    """(sum of the plain box loss, sum of iou^lambda * loss) of a batch."""
    anchors, _, labels, deltas, gt = to_numpy(batch)
    flat, d = np.concatenate(anchors), np.concatenate(deltas, axis=1)
    plain = balanced = 0.0
    for n, r in np.argwhere((labels >= 0) & (labels < K)):
        delta = np.zeros(4) if at_anchors else d[n, r]
        loss = oracle.loc_loss([delta], [oracle.encode(gt[n, r], flat[r])], 0.11)[0]
        iou = oracle.box_iou(oracle.decode(delta, flat[r]), gt[n, r])
        plain += loss
        balanced += iou**LAMBDA * loss
    return plain, balanced


def w_loc_over_steps(rule, seeds, **kwargs):
    module = make_loss(loc_weight_rule=rule, **kwargs)
    values = []
    for seed in seeds:
        module(*make_batch(seed))
        values.append(module.w_loc_measurement.w_loc.item())
    return values


def ratio(*sums):
    return sum(s[0] for s in sums) / sum(s[1] for s in sums)


def test_each_rule_over_three_steps():
    sums = [sums_of(make_batch(seed)) for seed in range(3)]
    at_anchors = [sums_of(make_batch(seed), at_anchors=True) for seed in range(3)]
    expected = {
        ("first", 1): [ratio(sums[0])] * 3,
        ("first", 2): [ratio(sums[0]), ratio(*sums[:2]), ratio(*sums[:2])],
        ("anchors", 1): [ratio(at_anchors[0])] * 3,
        ("anchors", 2): [ratio(at_anchors[0]), ratio(*at_anchors[:2]), ratio(*at_anchors[:2])],
        ("running", 2): [ratio(s) for s in sums],
    }
    for (rule, steps), values in expected.items():
        got = w_loc_over_steps(rule, range(3), loc_weight_steps=steps)
        np.testing.assert_allclose(got, values, rtol=1e-5, err_msg=rule)


def test_steps_without_positives_do_not_count():
    module = make_loss(loc_weight_steps=2)
    anchors, logits, labels, deltas, gt = make_batch(0)
    module(anchors, logits, [torch.full_like(x, K) for x in labels], deltas, gt)
    for seed in range(3):
        module(*make_batch(seed))
    measured = module.w_loc_measurement.w_loc.item()
    np.testing.assert_allclose(
        measured, ratio(*(sums_of(make_batch(s)) for s in (0, 1))), rtol=1e-5
    )


def test_the_spread_of_the_steps_is_logged(caplog):
    module = make_loss(loc_weight_steps=4)
    with caplog.at_level(logging.INFO, logger="iou_balanced_d2"):
        for seed in range(5):
            module(*make_batch(seed))
    single = [ratio(sums_of(make_batch(seed))) for seed in range(4)]
    spread = np.std(single, ddof=1)
    error = spread / 2 / np.mean(single)
    assert f"over 4 steps (standard deviation of the steps {spread:.2f}" in caplog.text
    assert f"relative standard error {error:.1%})" in caplog.text
    assert caplog.text.count("w_loc measured") == 1


def test_a_step_without_positives_delays_the_log_by_one_step(caplog):
    module = make_loss(loc_weight_steps=4)
    anchors, logits, labels, deltas, gt = make_batch(0)
    with caplog.at_level(logging.INFO, logger="iou_balanced_d2"):
        module(anchors, logits, [torch.full_like(x, K) for x in labels], deltas, gt)
        for seed in range(4):
            assert "w_loc measured" not in caplog.text
            module(*make_batch(seed))
    assert caplog.text.count("w_loc measured") == 1


def test_running_keeps_the_sum_of_the_box_loss_at_every_step():
    running = make_loss(loc_weight_rule="running", normalizer="batch")
    plain = make_loss(loc_lambda=0.0, normalizer="batch")
    for seed in range(3):
        got, expected = (m(*make_batch(seed))["loss_box_reg"] for m in (running, plain))
        torch.testing.assert_close(got, expected)


def test_running_is_plain_where_no_box_overlaps():
    module = make_loss(loc_weight_rule="running", normalizer="batch")
    plain = make_loss(loc_lambda=0.0, normalizer="batch")
    module(*make_batch())
    anchors, logits, labels, deltas, gt = make_batch()
    far = [box + 1000 for box in gt]
    got, expected = (m(anchors, logits, labels, deltas, far) for m in (module, plain))
    torch.testing.assert_close(got["loss_box_reg"], expected["loss_box_reg"])


@pytest.mark.parametrize("rule", ["first", "anchors", "running"])
def test_state_of_each_rule_is_resumed_in_the_middle(rule):
    module = make_loss(loc_weight_rule=rule, loc_weight_steps=3)
    module(*make_batch(0))
    resumed = make_loss(loc_weight_rule=rule, loc_weight_steps=3)
    resumed.load_training_state(module.training_state())
    for seed in (1, 2, 3):
        torch.testing.assert_close(resumed(*make_batch(seed)), module(*make_batch(seed)))
        assert resumed.w_loc_measurement.w_loc == module.w_loc_measurement.w_loc


def test_a_resumed_training_may_go_over_to_running():
    measured, running = make_loss(loc_weight_steps=1), make_loss(loc_weight_rule="running")
    measured(*make_batch(0))
    running.load_training_state(measured.training_state())
    running(*make_batch(1))
    (expected,) = w_loc_over_steps("running", [1])
    assert running.w_loc_measurement.w_loc.item() == pytest.approx(expected)


@pytest.mark.parametrize("before", [0.0, 1.0])
def test_a_resumed_training_with_another_power_measures_anew(before):
    module, resumed = (make_loss(loc_lambda=x, loc_weight_steps=1) for x in (before, 1.5))
    module(*make_batch(0))
    resumed.load_training_state(module.training_state())
    resumed(*make_batch(1))
    (expected,) = w_loc_over_steps("first", [1])
    assert resumed.w_loc_measurement.w_loc.item() == pytest.approx(expected)


@pytest.mark.parametrize("change", [
    {"loc_weight_rule": "anchors"}, {"box_reg_loss_type": "giou"}, {"loc_lambda": 1.0},
    {"loc_weight_steps": 2},
])  # fmt: skip
def test_a_resumed_training_of_other_options_measures_anew(change):
    module = make_loss(loc_weight_steps=1)
    resumed, new = (make_loss(**{"loc_weight_steps": 1, **change}) for _ in range(2))
    module(*make_batch(0))
    resumed.load_training_state(module.training_state())
    for changed in (resumed, new):
        changed(*make_batch(1))
    assert resumed.w_loc_measurement.w_loc == new.w_loc_measurement.w_loc
    assert resumed.w_loc_measurement.w_loc != module.w_loc_measurement.w_loc


def test_a_w_loc_that_can_not_be_measured_is_told_once(caplog):
    caplog.set_level(logging.INFO, logger="iou_balanced_d2")
    module = make_loss(loc_weight_steps=3)
    anchors, logits, labels, deltas, gt = make_batch()
    far = [box + 1000 for box in gt]
    for _ in range(7):
        module(anchors, logits, labels, deltas, far)
    assert caplog.text.count("w_loc could not be measured in 3 steps") == 1
    for _ in range(5):  # then it can be
        module(anchors, logits, labels, deltas, gt)
    assert "over 3 steps" in caplog.text
    (expected,) = w_loc_over_steps("first", [0])
    assert module.w_loc_measurement.w_loc.item() == pytest.approx(expected)


@pytest.mark.parametrize(("spread", "warned"), [(0.3, False), (1.2, True)])
def test_a_w_loc_that_is_too_large_is_told(caplog, spread, warned):
    module = make_loss()
    with caplog.at_level(logging.INFO, logger="iou_balanced_d2"):
        module(*make_batch(spread=spread))
    assert "w_loc measured" in caplog.text
    assert (
        ("far above the paper's" in caplog.text)
        == warned
        == (module.w_loc_measurement.w_loc > 5).item()
    )


@pytest.mark.parametrize(
    ("rule", "cause"), [("first", "the first boxes are bad"), ("anchors", "overlap the objects")]
)
def test_the_cause_of_a_large_w_loc_is_the_rules(caplog, rule, cause):
    measurement = WLocMeasurement(LossOptions(loc_weight_rule=rule, loc_weight_steps=1))
    measurement.update(*torch.tensor([12.0, 2.0], dtype=torch.float64))
    assert cause in caplog.text
    assert ("LOC_WEIGHT_RULE anchors" in caplog.text) == (rule == "first")


def test_loc_mean_weight_is_what_the_box_loss_weighs():
    module = make_loss(loc_weight=3.049, normalizer="batch")
    plain = make_loss(loc_lambda=0.0, normalizer="batch")
    got, expected = (m(*make_batch())["loss_box_reg"].item() for m in (module, plain))
    mean_weight = module.w_loc_measurement.mean_weight(*map(torch.tensor, sums_of(make_batch())))
    np.testing.assert_allclose(mean_weight.item(), got / expected, rtol=1e-5)


def test_a_running_w_loc_beyond_float32_is_not_used():
    measurement = WLocMeasurement(LossOptions(loc_weight_rule="running"))
    measurement.update(*torch.tensor([30.0, 2e-43], dtype=torch.float64))
    assert measurement.weights(torch.tensor([0.0, 0.5])).tolist() == [1.0, 1.0]


def test_loc_mean_weight_is_logged_of_the_boxes_also_while_w_loc_is_measured_at_the_anchors():
    module = make_loss(loc_weight_rule="anchors", loc_weight_steps=50, normalizer="batch")
    plain = make_loss(loc_lambda=0.0, normalizer="batch")
    with EventStorage(19) as storage:
        got = module(*make_batch())["loss_box_reg"].item()
        logged = storage.latest()["iou_balanced/loc_mean_weight"][0]
    expected = plain(*make_batch())["loss_box_reg"].item()
    assert logged == pytest.approx(got / expected, rel=1e-5)

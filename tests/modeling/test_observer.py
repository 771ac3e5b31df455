"""The losses' observer: what the histograms are made of."""

import torch
from detectron2.utils.events import EventStorage

from iou_balanced_d2.engine.visualization import LossHistograms

from ..toy import toy_batch, toy_model


def test_the_observer_sees_the_positives_of_the_step():
    model = toy_model("MODEL.IOU_BALANCED.LOC_WEIGHT", 2.0)
    (loss,) = [m for m in model.modules() if hasattr(m, "observer")]
    seen = []
    loss.observer = seen.append
    with EventStorage(0) as storage:
        model(toy_batch())
        num_pos = 2 * storage.latest()["num_pos_anchors"][0]
    assert list(seen[0]) == ["pos_iou", "cls_weight", "loc_weight"]
    assert all(x.shape == (num_pos,) and not x.requires_grad for x in seen[0].values())
    iou = seen[0]["pos_iou"]
    torch.testing.assert_close(seen[0]["loc_weight"], 2 * iou**1.5)
    torch.testing.assert_close(
        seen[0]["cls_weight"] / seen[0]["cls_weight"][0], (iou / iou[0]) ** 1.5
    )


def test_histograms_of_a_real_step():
    model = toy_model()
    hook = LossHistograms(1, model)
    hook.trainer = type("Fake", (), {"iter": 0})
    hook.before_step()
    with EventStorage(0) as storage:
        model(toy_batch())
        tags = [h["tag"] for h in storage._histograms]
    hook.after_step()
    assert tags == [f"iou_balanced/{x}" for x in ("pos_iou", "cls_weight", "loc_weight")]
    with EventStorage(1) as storage:
        model(toy_batch())
        assert storage._histograms == []

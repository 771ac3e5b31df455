"""Labels of anchors against detectron2's own, whatever the boxes."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling import RetinaNet
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances
from hypothesis import example, given, settings
from hypothesis import strategies as st

from iou_balanced_d2.modeling import matching

K = 5


def make_anchors(height, width, strides=(8, 16, 32)):
    """RetinaNet's 9 anchors at each place of each level."""
    generator = DefaultAnchorGenerator(
        sizes=[[x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (32, 64, 128)[: len(strides)]],
        aspect_ratios=[[0.5, 1.0, 2.0]],
        strides=list(strides),
    )
    return generator([torch.zeros(1, 1, height // s, width // s) for s in strides])


def make_instances(boxes):
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    classes = torch.arange(len(boxes)) % K
    return Instances((1, 1), gt_boxes=Boxes(boxes), gt_classes=classes)


def check(anchors, instances, matcher):
    """Equal labels for all anchors, equal boxes at the positives."""
    stock = SimpleNamespace(anchor_matcher=matcher, num_classes=K)
    expected, expected_boxes = RetinaNet.label_anchors(stock, anchors, instances)
    labels, boxes = matching.label_anchors(anchors, instances, matcher, K)
    for a, b, x, y in zip(labels, expected, boxes, expected_boxes, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
        assert x.shape == y.shape
        positive = (a >= 0) & (a < K)
        assert torch.equal(x[positive], y[positive])
    return labels


matchers = st.builds(
    Matcher,
    st.sampled_from([[0.4, 0.5], [0.3, 0.7], [0.5, 0.5]]),
    st.sampled_from([[0, -1, 1], [0, 0, 1], [-1, 0, 1]]),
    st.booleans(),
)
# Whole numbers make ties; boxes without area and outside of the image happen in real files.
numbers = st.one_of(st.integers(-40, 200).map(float), st.floats(-40, 200, width=32))
boxes = st.tuples(numbers, numbers, st.sampled_from([0.0, 0.5, 8.0, 32.0, 90.0]), numbers).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + abs(b[3]))
)


@pytest.mark.parametrize("few_pairs", [0, 1 << 19])  # block by block, and the whole IoU
@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(boxes, max_size=12), min_size=1, max_size=3), matchers)
@example([[(0, 0, 0, 0)]], Matcher([0.4, 0.5], [0, -1, 1], True))  # touches no anchor
@example([[(8, 8, 40, 40), (8, 8, 40, 40)], []], Matcher([0.4, 0.5], [0, -1, 1], True))
def test_labels_are_detectron2s(few_pairs, images, matcher):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_FEW_PAIRS", few_pairs)
        patch.setattr(matching, "_CPU_ANCHORS", 100)
        check(make_anchors(96, 128), [make_instances(x) for x in images], matcher)


def test_labels_are_detectron2s_over_many_blocks():
    corner = torch.rand(60, 2) * torch.tensor([600.0, 440.0])
    boxes = torch.cat([corner, corner + torch.exp(torch.rand(60, 2) * 4 + 1)], dim=1)
    matcher = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
    labels = check(make_anchors(480, 640), [make_instances(boxes)], matcher)
    assert {-1, K} < set(labels[0].tolist())


def test_a_matcher_of_ones_own_is_asked_whatever_the_size(monkeypatch):
    class OnlyOverlapping(Matcher):
        def set_low_quality_matches_(self, labels, quality):
            if quality.max() > 0:
                super().set_low_quality_matches_(labels, quality[quality.max(dim=1).values > 0])

    monkeypatch.setattr(matching, "_FEW_PAIRS", 0)
    matcher = OnlyOverlapping([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
    instances = [make_instances([[0, 0, 32, 32], [900, 900, 932, 932]])]
    labels = check(make_anchors(128, 128), instances, matcher)
    assert 0 < (labels[0] == 0).sum() < 100
    assert not (labels[0] == 1).any()


def test_a_large_image_takes_little_memory_at_a_time(monkeypatch):
    pairs = []

    def watched(a, b):
        pairs.append(len(a) * b.shape[1])
        return original(a, b)

    original = matching._pairwise_iou
    monkeypatch.setattr(matching, "_pairwise_iou", watched)
    boxes = torch.tensor([[0.0, 0.0, 640.0, 480.0]]).repeat(100, 1)
    matcher = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=False)
    matching.label_anchors(make_anchors(480, 640), [make_instances(boxes)], matcher, K)
    assert max(pairs) <= matching.CPU_BLOCK

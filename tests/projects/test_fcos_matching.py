"""Labels of FCOS's points against detectron2's own, whatever the boxes."""

from functools import partial
from types import SimpleNamespace

import torch
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.structures import Boxes, Instances
from hypothesis import example, given, settings
from hypothesis import strategies as st

from iou_balanced_d2.projects.fcos.matching import label_points

K = 5


def make_points(strides, size=256):
    """A square of the level's stride around each place of each level."""
    levels = []
    for stride in strides:
        x = torch.arange(0, size, stride).float()
        corner = torch.cartesian_prod(x, x).flip(1)
        levels.append(Boxes(torch.cat([corner - stride / 2, corner + stride / 2], dim=1)))
    return levels


numbers = st.one_of(st.integers(-40, 280).map(float), st.floats(-40, 280, width=32))
sizes = st.sampled_from([0.0, 3.0, 16.0, 64.0, 65.0, 128.0, 250.0])
boxes = st.tuples(numbers, numbers, sizes, sizes).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(boxes, max_size=20), min_size=1, max_size=3),
    st.sampled_from([(8,), (8, 16), (8, 16, 32, 64)]),
    st.sampled_from([0.5, 1.5, 3.0]),
)
@example([[(0, 0, 64, 64), (0, 0, 64, 64)], []], (8, 16, 32), 1.5)
def test_labels_are_detectron2s(images, strides, radius):
    stock = SimpleNamespace(center_sampling_radius=radius, num_classes=K)
    stock._match_anchors = partial(FCOS._match_anchors, stock)
    instances = [
        Instances(
            (256, 256),
            gt_boxes=Boxes(torch.tensor(x, dtype=torch.float32).reshape(-1, 4)),
            gt_classes=torch.arange(len(x)) % K,
        )
        for x in images
    ]
    points = make_points(strides)
    expected, expected_boxes = FCOS.label_anchors(stock, points, instances)
    labels, boxes = label_points(stock._match_anchors, radius, points, instances, K)
    for a, b, x, y in zip(labels, expected, boxes, expected_boxes, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(x[a < K], y[a < K])

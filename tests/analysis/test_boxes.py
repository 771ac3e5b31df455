"""Boxes and labels in a picture."""

import numpy as np
import pytest

from iou_balanced_d2.analysis.boxes import _COLORS, _places, draw_boxes

GREY = np.full((200, 300, 3), 128, np.uint8)


def pixels(picture, k):
    """The pixels in the colour of a class, (H, W) bool."""
    return (np.abs(picture - 255 * _COLORS[k]) < 3).all(axis=2)


def test_a_class_has_its_colour_in_every_picture():
    box = np.array([[50, 60, 150, 160]])
    for k in (0, 5, 7):
        for _ in range(2):
            picture = draw_boxes(GREY, box, [k], ["name"])
            assert picture.shape == GREY.shape
            assert pixels(picture, k)[59:62, 100:150].any(axis=0).all(), "the upper side"
            assert pixels(picture, k)[40:59, 50:80].sum() > 150, "behind the label"
            assert (picture[:, 160:] == 128).all()
    assert (GREY == 128).all()


def test_a_picture_can_be_larger_than_the_image():
    picture = draw_boxes(GREY, [[50, 60, 150, 160]], [1], ["a$b$"], scale=2)
    assert picture.shape == (400, 600, 3)
    assert pixels(picture, 1)[118:123, 100:300].any(axis=0).all()
    assert (draw_boxes(GREY, [], [], []) == GREY).all()


@pytest.mark.parametrize("seed", range(5))
def test_labels_stay_inside_and_clear_of_each_other(seed):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-20, 900, (12, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(5, 300, (12, 2))], axis=1)
    boxes[1] = boxes[0]
    found = list(_places(boxes, [(90, 20)] * 12, 1000, 1000))
    for i, (x, y) in enumerate(found):
        assert 0 <= x <= 910
        assert 0 <= y <= 980
        for u, v in found[:i]:
            assert abs(x - u) >= 90 or abs(y - v) >= 20

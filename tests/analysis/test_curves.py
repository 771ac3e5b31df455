"""Losses and AP of trainings, read and drawn."""

import json

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from iou_balanced_d2.analysis.curves import draw_curves, write_curves
from iou_balanced_d2.analysis.plots import COLORS


def write_log(folder, lines, end=""):
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)) + end)


def test_losses_and_aps_have_a_panel_each():
    long = [(20 * i, 1 / (i + 1)) for i in range(60)]
    names = ("x/bbox/AP", "lr", "bbox/AP-cat", "loss_box_reg", "validation/total_loss")
    log = {"total_loss": long, **{name: [(9, 1.0)] for name in names}}
    loss, short, validation, ap = draw_curves(log).axes
    assert (loss.get_title(), ap.get_title()) == ("total_loss (mean of 20)", "x/bbox/AP")
    assert (short.get_title(), validation.get_title()) == ("loss_box_reg", "validation/total_loss")
    x, y = loss.lines[0].get_data()
    assert (x[0], len(x)) == (380, 41)
    assert y[0] == pytest.approx(np.mean([v for _, v in long[:20]]))
    assert ap.lines[0].get_marker() != "", "one point is no line"
    assert draw_curves({"lr": long}) is None


def test_a_training_gets_its_picture(tmp_path):
    lines = [{"iteration": 20 * i, "total_loss": 1.0, "loss_cls": float("nan")} for i in range(3)]
    write_log(tmp_path, lines)
    write_curves(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "metrics.json"]
    picture = matplotlib.image.imread(tmp_path / "curves.png")[..., :3]
    assert (np.abs(picture - to_rgb(COLORS[0])) < 0.02).all(axis=2).sum() > 100


def test_what_goes_wrong_is_logged_only(tmp_path, caplog):
    write_curves(tmp_path)
    write_curves(tmp_path / "nowhere")
    (tmp_path / "metrics.json").write_bytes(b"\xff{[1}\n\n")
    write_curves(tmp_path)
    assert not (tmp_path / "curves.png").exists(), "nothing logged, nothing drawn"
    assert not caplog.records
    write_log(tmp_path, [{"iteration": 0, "total_loss": float("inf")}])
    (tmp_path / "curves.png").mkdir()
    write_curves(tmp_path)
    assert "curves.png is not drawn" in caplog.text

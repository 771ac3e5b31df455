"""Losses and AP of trainings, read and drawn."""

import json

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from iou_balanced_d2.analysis.curves import draw_curves, read_curves, write_curves
from iou_balanced_d2.analysis.plots import COLORS


def write_log(folder, lines, end=""):
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)) + end)


def test_losses_and_aps_are_read(tmp_path):
    lines = [
        {"iteration": 19, "total_loss": 2.0, "lr": 0.1, "loss_fcos_loc": 1.0},
        {"iteration": 39, "total_loss": 1.5, "bbox/AP": 10.0, "validation/total_loss": 3.0},
        {"iteration": 39, "total_loss": 1.0, "x/bbox/AP": 11.0, "bbox/AP-cat": 3.0},
    ]
    write_log(tmp_path, lines, '\n{"iteration": 59, "tot')
    assert read_curves(tmp_path) == {
        "total_loss": [(19, 2.0), (39, 1.0)],
        "loss_fcos_loc": [(19, 1.0)],
        "bbox/AP": [(39, 10.0)],
        "validation/total_loss": [(39, 3.0)],
        "x/bbox/AP": [(39, 11.0)],
    }
    (tmp_path / "metrics.json").unlink()
    assert read_curves(tmp_path) == {}


def test_panels_and_colours():
    long = [(20 * i, 1 / (i + 1)) for i in range(60)]
    runs = [
        (0, "plain", {"bbox/AP": [(9, 1.0)], "total_loss": long}),
        (1, "both", {"total_loss": long[:3]}),
        (1, "both", {"total_loss": long[:2]}),
    ]
    loss, ap = draw_curves(runs).axes
    assert (loss.get_title(), ap.get_title()) == ("total_loss (mean of 20)", "bbox/AP")
    assert [line.get_color() for line in loss.lines] == [COLORS[0], COLORS[1], COLORS[1]]
    assert [t.get_text() for t in loss.get_legend().get_texts()] == ["plain", "both"]
    x, y = loss.lines[0].get_data()
    assert (x[0], len(x)) == (380, 41)
    assert y[0] == pytest.approx(np.mean([v for _, v in long[:20]]))
    assert len(loss.lines[1].get_xdata()) == 3, "too few to be averaged"
    assert ap.lines[0].get_marker() != "", "one point is no line"


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

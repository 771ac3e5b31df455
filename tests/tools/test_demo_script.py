"""demo/demo.py on pictures."""

import os
import pickle
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from iou_balanced_d2.commands import demo as demo_module
from iou_balanced_d2.commands import run_command, visualize_results
from iou_balanced_d2.data import known_classes, register_datasets_of
from iou_balanced_d2.engine import load_config
from iou_balanced_d2.model_zoo import get_config_file

from ..command import forget_own_data
from ..toy import toy_model

CONFIG = get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")


@pytest.fixture
def demo():
    """The command's module."""
    return demo_module


@pytest.fixture
def run(demo, tmp_path, monkeypatch):
    """Run the script in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, args)])
        return run_command("demo")

    return call


class _Finder:
    """In the place of detectron2's predictor: two boxes of scores .9 and .4, of classes 1 and 0."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.model = torch.nn.Linear(1, 1)

    def __call__(self, image):
        assert image.dtype == np.uint8
        found = Instances(image.shape[:2])
        found.pred_boxes = Boxes(torch.tensor([[20.0, 20, 50, 50], [5.0, 5, 12, 12]]))
        found.scores, found.pred_classes = torch.tensor([0.9, 0.4]), torch.tensor([1, 0])
        return {"instances": found}


@pytest.fixture
def run_fast(run, demo, own_data, tmp_path, monkeypatch):
    """Run on own data, with found boxes made up and any weights."""
    forget_own_data()
    monkeypatch.setattr(demo, "DefaultPredictor", _Finder)
    torch.save(_Finder(None).model.state_dict(), tmp_path / "weights.pth")
    options = ["MODEL.WEIGHTS", "weights.pth", "DATASETS.COCO_JSON", repr((("own", *own_data),)),
               "DATASETS.TEST", "('own',)"]  # fmt: skip
    return lambda *args: run(
        "--config-file", CONFIG, *args, "--output", "found", "--opts", *options
    )


def drawn(file, region):
    """Number of pixels in a region (of the 64 pixels' picture) that are not the images' grey."""
    picture = cv2.imread(str(file))
    assert picture.shape == (640, 640, 3), "small pictures are enlarged"
    x0, y0, x1, y1 = (10 * v for v in region)
    grey = [(np.abs(picture[y0:y1, x0:x1].astype(int) - v) < 12).all(axis=2) for v in (40, 220)]
    return int((~(grey[0] | grey[1])).sum())


def test_a_folder_is_drawn_above_the_threshold(run_fast, tmp_path, capsys):
    assert run_fast("--input", "images", "--confidence-threshold", 0.5) == 0
    assert sorted(p.name for p in (tmp_path / "found").iterdir()) == [f"{i}.png" for i in range(4)]
    assert drawn(tmp_path / "found/0.png", (45, 30, 55, 52)) > 200
    assert drawn(tmp_path / "found/0.png", (3, 3, 7, 14)) == 0, "score .4 is below"
    assert "4 pictures: found\n4 boxes of score 0.5 or more\n" in capsys.readouterr().out
    assert run_fast("--input", "images/0.png", "--confidence-threshold", 0.3) == 0
    assert drawn(tmp_path / "found/0.png", (3, 3, 7, 14)) > 100


def test_names_of_the_classes_are_those_of_the_data_set(own_data):
    forget_own_data()
    words = ["DATASETS.COCO_JSON", repr((("own", *own_data),)), "DATASETS.TEST", "('own',)"]
    cfg = load_config(CONFIG, [*words, "MODEL.RETINANET.NUM_CLASSES", "2"])
    register_datasets_of(cfg)
    assert known_classes(cfg) == ["square", "circle"]
    cfg.merge_from_list(["MODEL.RETINANET.NUM_CLASSES", 80, "DATASETS.TRAIN", ("own",)])
    assert known_classes(cfg) == [], "the names are of another number of classes"


@pytest.mark.parametrize(("scores", "message"), [
    ([0.9, 0.4], "0 boxes of score 0.95 or more: the best score is 0.90, see --confidence-thr"),
    ([], "0 boxes of score 0.95 or more, nor of any other: does the model fit the pictures?"),
])  # fmt: skip
def test_without_a_box_the_best_score_is_said(run_fast, monkeypatch, capsys, scores, message):
    find = _Finder.__call__
    found = lambda self, x: {"instances": find(self, x)["instances"][: len(scores)]}  # noqa: E731
    monkeypatch.setattr(_Finder, "__call__", found)
    assert run_fast("--input", "images", "--confidence-threshold", 0.95) == 0
    assert message in capsys.readouterr().out


def test_folders_are_read_with_their_subfolders(run_fast, tmp_path, capsys):
    """But not what was drawn before, nor a folder without pictures."""
    for name in ("a/0.png", "b/deep/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / "images" / Path(name).name).rename(tmp_path / name)
    for _ in range(2):
        assert run_fast("--input", ".") == 0
        assert sorted(p.name for p in (tmp_path / "found").iterdir()) == [
            f"{i}.png" for i in range(4)
        ]
    (tmp_path / "empty/er").mkdir(parents=True)
    assert run_fast("--input", "empty") == 2
    assert "--input 'empty': no pictures in this folder" in capsys.readouterr().err


def test_patterns_and_equal_names(run_fast, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "images/0.png").rename(tmp_path / "more/1.png")
    (tmp_path / "more/notes.txt").write_text("no picture")
    assert run_fast("--input", "images/[12].png", "more") == 0
    names = sorted(p.name for p in (tmp_path / "found").iterdir())
    assert names == ["1.png", "1_2.png", "2.png"]


def test_no_picture_is_drawn_over_an_input(run_fast, tmp_path, capsys):
    """Nor over the next folder's; what is not there has no part in this."""
    for name in ("images/0.png", "found/0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((tmp_path / "images/1.png").read_bytes())
    mine = (tmp_path / "found/0.png").read_bytes()
    assert run_fast("--input", "images", "found") == 2
    message = "found/0.png would be overwritten: give another folder as --output"
    assert message in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "found").iterdir()] == ["0.png"], "nothing is drawn"
    assert (tmp_path / "found/0.png").read_bytes() == mine
    assert run_fast("--input", "gone/0.png", "images/1.png") == 1
    assert "gone/0.png: skipped, can't be read" in capsys.readouterr().err


def test_missing_and_broken_files_are_named_and_skipped(run_fast, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    whole = (tmp_path / "images/1.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    args = ("broken.jpg", "cut.png", "images/2.png", "missing.jpg", "none/*.png")
    assert run_fast("--input", *args) == 1
    assert [p.name for p in (tmp_path / "found").iterdir()] == ["2.png"]
    error = capsys.readouterr().err
    for name in ("broken.jpg", "cut.png", "missing.jpg", "none/*.png"):
        assert f"{name}: skipped, can't be read: " in error
    assert "broken.jpg: skipped, can't be read: not an image" in error
    assert "4 file(s) could not be read" in error


def test_strips_deep_and_huge_pictures(run_fast, demo, tmp_path, capsys, monkeypatch):
    """Long ones are drawn within bounds; what would be misread is named."""
    cv2.imwrite(str(tmp_path / "long.png"), np.full((3000, 8, 3), 40, np.uint8))
    cv2.imwrite(str(tmp_path / "strip.png"), np.full((1, 5000, 3), 40, np.uint8))
    cv2.imwrite(str(tmp_path / "deep.png"), np.full((64, 64), 40_000, np.uint16))
    assert run_fast("--input", "long.png", "strip.png", "deep.png") == 1
    assert [p.name for p in (tmp_path / "found").iterdir()] == ["long.png"]
    assert max(cv2.imread(str(tmp_path / "found/long.png")).shape) <= demo.MAX_SIDE
    error = capsys.readouterr().err
    assert "strip.png: skipped: image so long and narrow" in error
    assert "deep.png: skipped: image of 16 bit" in error
    for module in (demo, visualize_results):
        monkeypatch.setattr(module, "MAX_SIDE", 50)
    assert run_fast("--input", "images/0.png") == 0
    assert cv2.imread(str(tmp_path / "found/0.png")).shape == (50, 50, 3)
    assert "images/0.png: drawn with a side of 50 pixels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--config-file", "no.yaml", "--input", "x"), "config file 'no.yaml' not found"),
        (("--config-file", CONFIG, "--input", "x", "--opts", "MODEL.WEIGHTS"), "come in pairs"),
        (("--config-file", CONFIG, "--input", "x", "--opts", "MODEL.WIGHTS", "y"), "did you mean"),
        (("--config-file", CONFIG, "--input", "x", "--opts", "MODEL.WEIGHTS", "no.pth"),
         "MODEL.WEIGHTS 'no.pth' not found"),
        (("--config-file", CONFIG, "--input", "x", "--opts", "MODEL.WEIGHTS", ""),
         "give --opts MODEL.WEIGHTS FILE"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(run, args, message, capsys):
    assert run("--output", "found", *args) == 2
    error = capsys.readouterr().err
    assert error.startswith("demo.py: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_real_model_runs(run, tmp_path, own_config, own_data):
    """Nothing made up: the toy model's weights, on the CPU."""
    forget_own_data()
    model = toy_model("MODEL.RETINANET.NUM_CLASSES", 2)
    torch.nn.init.constant_(model.head.cls_score.bias, 3.0)
    torch.save(model.state_dict(), tmp_path / "toy.pth")
    args = ("--config-file", own_config, "--input", "images/0.png", "--output", "found")
    assert run(*args, "--opts", "MODEL.WEIGHTS", "toy.pth") == 0
    assert drawn(tmp_path / "found/0.png", (0, 0, 64, 64)) > 1000


class _Code:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("made",)


def test_weights_that_hold_code_or_do_not_fit_are_refused(run, tmp_path, own_config, capsys):
    def message(weights):
        args = ("--config-file", own_config, "--input", "images/0.png", "--output", "found")
        assert run(*args, "--opts", "MODEL.WEIGHTS", weights) == 2
        error = capsys.readouterr().err
        assert error.startswith("demo.py: error: checkpoint ")
        assert error.count("\n") == 1
        return error

    for name in ("code.pkl", "code.pth"):
        (tmp_path / name).write_bytes(pickle.dumps({"model": _Code()}))
        message(name)
        assert not (tmp_path / "made").exists()
    weights = toy_model("MODEL.RETINANET.NUM_CLASSES", 2).state_dict()
    del weights["head.cls_score.bias"]
    torch.save(weights, tmp_path / "part.pth")
    assert "head.cls_score.bias is missing" in message("part.pth")

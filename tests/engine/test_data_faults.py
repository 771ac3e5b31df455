"""Images that break in the middle of training: the run ends with one line that names them."""

import json
from pathlib import Path

import pytest

from iou_balanced_d2.commands import run_command

from ..command import forget_own_data


@pytest.fixture
def run(monkeypatch, capfd, caplog):
    def call(*args, cwd):
        forget_own_data()
        monkeypatch.chdir(cwd)
        with caplog.at_level("INFO"):
            code = run_command("train", [str(x) for x in args])
        out, err = capfd.readouterr()
        return code, out + caplog.text, err

    return call


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_is_named(run, tmp_path, own_config, workers):
    path = tmp_path / "images/2.png"
    path.write_bytes(path.read_bytes()[:60])
    code, _, err = run("--config-file", own_config, "DATALOADER.NUM_WORKERS", workers, cwd=tmp_path)
    assert code == 2
    assert err.splitlines()[-1].startswith(
        "train_net.py: error: data set 'own': image 'images/2.png' can't be used: "
    )


def test_checking_every_image_first_finds_it_before_anything_is_written(run, tmp_path, own_config):
    path = tmp_path / "images/2.png"
    path.write_bytes(path.read_bytes()[:60])
    code, _, err = run("--config-file", own_config, "--check-dataset", cwd=tmp_path)
    assert code == 2
    assert "images/2.png" in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_bad_boxes_are_named_and_left_out(run, tmp_path, own_config):
    path = Path(tmp_path / "annotations.json")
    content = json.loads(path.read_text())
    content["annotations"][3]["bbox"] = [5, 5, 0, 7]
    path.write_text(json.dumps(content))
    code, out, err = run("--config-file", own_config, "SOLVER.MAX_ITER", 1, cwd=tmp_path)
    assert code == 0, err
    assert "1 boxes of no area or outside" in out
    assert "'3.png', annotation 4: box [5, 5, 0, 7]" in out + err


def test_unknown_categories_are_an_error(run, tmp_path, own_config):
    path = Path(tmp_path / "annotations.json")
    content = json.loads(path.read_text())
    content["annotations"][3]["category_id"] = 5
    path.write_text(json.dumps(content))
    code, _, err = run("--config-file", own_config, cwd=tmp_path)
    assert code == 2
    assert "1 x unknown category: annotations[3] (id 4): category_id 5" in err.splitlines()[-1]


def test_anchors_that_can_not_match_the_boxes_are_reported(run, tmp_path, own_config):
    sizes = ["MODEL.ANCHOR_GENERATOR.SIZES", "[[256], [256], [512], [512], [512]]"]
    words = [*sizes, "SOLVER.MAX_ITER", 1]
    code, out, err = run("--config-file", own_config, *words, cwd=tmp_path)
    assert code == 0, err
    assert "only 0% of the boxes meet an anchor at IoU 0.5; " in out + err

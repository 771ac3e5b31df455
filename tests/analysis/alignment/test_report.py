"""The page, its files, and the command that writes them."""

import json
import re
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from iou_balanced_d2.analysis.alignment import write_alignment_report
from iou_balanced_d2.analysis.plots import COLORS, save_figure
from iou_balanced_d2.commands import run_command
from iou_balanced_d2.errors import UserError

from ...command import forget_own_data
from ...evaluation.synthetic import coco_of

FIGURES = ["ap", "calibration", "density", "score_by_iou", "share_by_iou"]
# On the squares of the fixture own_data (XYWH 8, 10 + i, 28, 30): one bad box with a high score,
# and on image 1 one that outranks a better box.
DETECTIONS = [
    {"image_id": 0, "category_id": 7, "bbox": [8, 10, 28, 12], "score": 0.95},
    {"image_id": 1, "category_id": 7, "bbox": [8, 11, 28, 20], "score": 0.9},
    {"image_id": 1, "category_id": 7, "bbox": [8, 11, 28, 29], "score": 0.3},
    {"image_id": 2, "category_id": 7, "bbox": [8, 12, 28, 30], "score": 0.6},
]


@pytest.fixture
def detections(tmp_path):
    file = tmp_path / "found.json"
    file.write_text(json.dumps(DETECTIONS))
    return str(file)


@pytest.fixture
def draw_fast(monkeypatch):
    """PNG only: the SVGs take longer than all else."""

    def save(figure, file):
        figure.savefig(file, dpi=40)
        return file

    module = "iou_balanced_d2.analysis.alignment.figures.save_figure"
    monkeypatch.setattr(module, save)


@pytest.fixture
def command(monkeypatch, tmp_path, draw_fast):
    forget_own_data()
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["analyze_alignment.py", *map(str, args)])
        return run_command("analyze")

    return run


def test_report_with_pictures(tmp_path, own_data, detections):
    ground_truth, images = own_data
    content = write_alignment_report(
        ground_truth, {"a<b": detections}, str(tmp_path / "out"), image_root=images
    )
    out = tmp_path / "out"
    assert sorted(p.name for p in out.glob("*.*")) == sorted(
        ["alignment.json", "index.html", *(f"{f}.{end}" for f in FIGURES for end in ("png", "svg"))]
    )
    assert json.loads((out / "alignment.json").read_text()) == content
    assert content["a<b"]["num_objects"] == 4
    assert content["a<b"]["classes"]["circle"]["ap"]["AP"] is None, "NaN is no JSON"
    for figure in FIGURES:
        assert COLORS[0].lower() in (out / f"{figure}.svg").read_text(), figure
        assert COLORS[1].lower() not in (out / f"{figure}.svg").read_text(), figure
    page = (out / "index.html").read_text()
    assert page.count("<img ") == len(FIGURES) + 2
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "the page needs no other file"
    assert page.index(content["a<b"]["verdict"]) < page.index("4 images, 4 objects")
    assert "Few data: 4 objects in 4 images" in page
    assert "(no object)" in page
    assert "a&lt;b" in page
    assert "a<b" not in page
    assert "0.png: square, score 0.95, IoU 0.40" in page
    assert "1.png: square, score 0.90, IoU 0.67; better placed: score 0.30, IoU 0.97" in page
    names = sorted(p.name for p in (out / "pictures").iterdir())
    assert names == ["misplaced_0_1.jpg", "outranked_0_1.jpg"]


def test_pictures_show_the_boxes(tmp_path, own_data, detections, draw_fast):
    ground_truth, images = own_data
    write_alignment_report(ground_truth, {"a": detections}, str(tmp_path), image_root=images)
    picture = cv2.imread(str(tmp_path / "pictures/outranked_0_1.jpg"))[:, :, ::-1].astype(int)
    assert max(picture.shape) == 480
    for color in ((230, 159, 0), (86, 180, 233), (255, 255, 255)):
        assert (np.abs(picture - color).max(axis=2) < 40).sum() > 300, color


def test_figures_are_written_twice(tmp_path, own_data, detections):
    from matplotlib.figure import Figure

    assert save_figure(Figure(), tmp_path / "x.png") == tmp_path / "x.png"
    assert (tmp_path / "x.svg").read_text().startswith("<?xml")


def test_command_with_files_of_any_framework(command, tmp_path, own_data, detections, capsys):
    shutil.copy(detections, "other.json")
    code = command("--ground-truth", own_data[0], "--detections", detections, "b=other.json",
                   "--output", "out")  # fmt: skip
    assert code == 0
    content = json.loads((tmp_path / "out/alignment.json").read_text())
    assert list(content) == ["found", "b"]
    assert content["found"]["ap"] == content["b"]["ap"]
    page = (tmp_path / "out/index.html").read_text()
    assert "the folder of the images was not given" in page
    printed = capsys.readouterr().out
    assert "perfect ranking" in printed
    assert "b: AP is " in printed
    assert f"<p>b: {content['b']['verdict']}</p>" in page


def test_command_with_a_run(command, tmp_path, own_config, capsys):
    results = tmp_path / "out/inference/own"
    results.mkdir(parents=True)
    shutil.copy(own_config, tmp_path / "out/config.yaml")
    (results / "coco_instances_results.json").write_text(json.dumps(DETECTIONS))
    assert command("--run", "out") == 0
    assert (tmp_path / "out/alignment/own/pictures/misplaced_0_1.jpg").is_file()
    assert "Report: out/alignment/own/index.html" in capsys.readouterr().out


@pytest.mark.parametrize(("policy", "ap50"), [("ignore", 100), ("drop", 100), ("count", 50.5)])
def test_difficult_objects_by_the_runs_policy(
    command, tmp_path, own_data, own_config, policy, ap50
):
    """Of two objects a difficult one is not found."""
    content = json.loads(Path(own_data[0]).read_text())
    content["annotations"] = content["annotations"][:2]
    content["annotations"][1]["difficult"] = 1
    Path(own_data[0]).write_text(json.dumps(content))
    results = tmp_path / "out/inference/own"
    results.mkdir(parents=True)
    config = yaml.safe_load(Path(own_config).read_text())
    config["DATASETS"]["VOC_DIFFICULT"] = policy
    (tmp_path / "out/config.yaml").write_text(yaml.safe_dump(config))
    found = {"image_id": 0, "category_id": 7, "bbox": [8, 10, 28, 30], "score": 0.9}
    (results / "coco_instances_results.json").write_text(json.dumps([found]))
    assert command("--run", "out") == 0
    report = json.loads((tmp_path / "out/alignment/own/alignment.json").read_text())
    assert report["out"]["ap"]["AP50"] == pytest.approx(ap50, abs=0.01)


def test_runs_of_two_policies_are_not_mixed(command, tmp_path, own_config, capsys):
    for name, policy in (("a", "ignore"), ("b", "count")):
        results = tmp_path / name / "inference/own"
        results.mkdir(parents=True)
        (results / "coco_instances_results.json").write_text("[]")
        config = yaml.safe_load(Path(own_config).read_text())
        config["DATASETS"]["VOC_DIFFICULT"] = policy
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(config))
    assert command("--run", "a", "b") == 2
    assert "a and b treat difficult objects differently" in capsys.readouterr().err


def test_nothing_found_is_a_report_too(tmp_path, own_data, draw_fast):
    (tmp_path / "none.json").write_text("[]")
    ground_truth, images = own_data
    content = write_alignment_report(
        ground_truth, {"a": str(tmp_path / "none.json")}, str(tmp_path / "out"), image_root=images
    )
    assert content["a"]["ap"]["AP"] == 0
    assert content["a"]["correlation"]["pearson"] is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "give --ground-truth and --detections, or --run"),
        (("--run", "out", "--images", "x"), "--run brings its own files"),
        (("--run", "out"), "run 'out' not found"),
        (("--ground-truth", "no.json", "--detections", "x.json"), "no.json: can't be read"),
        (("--ground-truth", "GT", "--detections", "x.json"), "x.json: can't be read"),
        (
            ("--ground-truth", "GT", "--detections", "a=x", "a=y"),
            "two sides are called 'a': give names",
        ),
        (("--ground-truth", "GT", "--detections", "D", "--images", "no"), "folder 'no' not found"),
        (("--ground-truth", "GT", "--detections", "D", "--images", "."), "0.png', named by"),
        (("--ground-truth", "GT", "--detections", "D", "--output", "GT"), "can't be written"),
    ],
)
def test_mistakes_are_one_line(command, own_data, detections, args, message, capsys):
    places = {"GT": own_data[0], "D": detections}
    assert command(*(places.get(word, word) for word in args)) == 2
    error = capsys.readouterr().err
    assert error.startswith("analyze_alignment.py: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_runs_that_were_not_evaluated_are_named(command, tmp_path, own_config, capsys):
    (tmp_path / "out").mkdir()
    shutil.copy(own_config, tmp_path / "out/config.yaml")
    assert command("--run", "out") == 2
    assert "coco_instances_results.json not found: evaluate" in capsys.readouterr().err


def test_of_many_classes_the_confused_ones_are_shown(tmp_path, draw_fast):
    """Objects of class 7 are detected as class 19, all others as what they are."""
    truth, found = coco_of([], num_images=20, num_classes=20).dataset, []
    for i in range(1, 21):
        box = {"image_id": i, "bbox": [0, 0, 50, 50], "area": 2500, "iscrowd": 0}
        truth["annotations"].append({"id": i, "category_id": i, **box})
        found.append({"category_id": 19 if i == 7 else i, "score": 0.5, **box})
    for name, content in (("truth.json", truth), ("found.json", found)):
        (tmp_path / name).write_text(json.dumps(content))
    files = str(tmp_path / "truth.json"), {"a": str(tmp_path / "found.json")}
    content = write_alignment_report(*files, str(tmp_path / "out"))
    assert content["a"]["confusion"][6][18] == 1
    page = (tmp_path / "out/index.html").read_text()
    assert "The 12 of 20 classes that are confused most." in page
    header = [h.strip() for h in re.findall(r"<th[^>]*>([^<]*)</th>", page)[-14:]]
    assert header == ["a", *(f"class{k}" for k in (*range(1, 12), 19)), "(missed)"]


def test_a_broken_image_is_left_out(tmp_path, own_data, detections, draw_fast, caplog):
    ground_truth, images = own_data
    (tmp_path / "images/1.png").write_bytes(b"no image")
    write_alignment_report(ground_truth, {"a": detections}, str(tmp_path), image_root=images)
    assert not (tmp_path / "pictures/outranked_0_1.jpg").exists()
    assert (tmp_path / "pictures/misplaced_0_1.jpg").exists()
    assert "1.png: can't be read, left out" in caplog.text


def test_the_folder_of_images_is_checked_before_anything_is_written(tmp_path, own_data, detections):
    with pytest.raises(UserError, match="image folder 'no' not found"):
        write_alignment_report(
            own_data[0], {"a": detections}, str(tmp_path / "out"), image_root="no"
        )
    assert not (tmp_path / "out").exists()

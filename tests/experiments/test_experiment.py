"""Carrying out a protocol, with a training script that takes no time."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml

from iou_balanced_d2.commands import reproduce as reproduce_command
from iou_balanced_d2.commands import run_command
from iou_balanced_d2.errors import UserError
from iou_balanced_d2.experiments.experiment import Experiment, hold_out
from iou_balanced_d2.experiments.protocol import Protocol, protocol_of_config

from ..analysis.drawn import draw_truth

FAKE = Path(__file__).parent / "fake_train_net.py"
ROOT = Path(__file__).parents[2]
ETA = "MODEL.IOU_BALANCED.CLS_ETA"
WEIGHT = "MODEL.IOU_BALANCED.LOC_WEIGHT"


def mean_of(variant):
    return {"mean_of": "iou_balanced/loc_mean_weight", "variant": variant}


@pytest.fixture
def coco(tmp_path):
    """A training set of ten images with two objects each."""
    content = {
        "images": [{"id": i, "file_name": f"{i}", "width": 9, "height": 9} for i in range(10)],
        "annotations": [
            {"id": 2 * i + j, "image_id": i, "category_id": 1, "bbox": [0, 0, 2, 2]}
            for i in range(10)
            for j in range(2)
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "train.json").write_text(json.dumps(content))
    name = f"experiment_{tmp_path.name}"
    return {
        "DATASETS.COCO_JSON": [[name, str(tmp_path / "train.json"), str(tmp_path)]],
        "DATASETS.TRAIN": [name],
        "DATASETS.TEST": ["never_looked_at"],
    }


@pytest.fixture
def experiment(tmp_path, coco):
    def make(**changes):
        (tmp_path / "detector.yaml").write_text("VERSION: 2\n")
        protocol = {
            "name": "toy",
            "description": "",
            "config": tmp_path / "detector.yaml",
            "data_sets": {"set": coco},
            "variants": {"loc": {}, "control": {WEIGHT: mean_of("loc")}, "x y/z": {}},
            "seeds": [1, 2],
            "memory_gib": 1.0,
        }
        return Experiment(
            Protocol(**(protocol | changes)), tmp_path / "runs", at_once=2, train=[str(FAKE)]
        )

    return make


def calls(folder):
    return (folder / "calls.txt").read_text().split()


def test_each_run_is_made_once_in_a_folder_of_its_own(experiment, tmp_path, capsys):
    runs = experiment().carry_out()
    assert {v: [r.complete for r in rs] for v, rs in runs["set"].items()} == {
        "loc": [True, True], "x y/z": [True, True], "control": [True, True]
    }  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    where = "runs/<data set>/<variant>/seed<n>/console.txt"
    assert lines[0] == f"6 runs, 2 at a time; each writes its output to {tmp_path}/{where}"
    (done,) = (i for i, line in enumerate(lines) if line.startswith("set/loc/seed1: done ("))
    assert lines.index("set/loc/seed1: started") < done
    folder = tmp_path / "runs/set/x_y_z/seed2"
    assert calls(folder) == ["started"]
    assert yaml.safe_load((folder / "run.yaml").read_text())["SEED"] == 2
    record = json.loads((folder / "run.json").read_text())
    assert record["command"][1:3] == [str(FAKE), "--config-file"]
    assert record["versions"].keys() >= {"torch", "detectron2"}
    assert record["seconds"] > 0
    assert record["cpu_seconds"] > 0
    assert record["peak_memory_mib"] > 1
    experiment().carry_out()
    assert calls(folder) == ["started"], "a complete run is skipped"


def test_the_controls_constant_is_the_mean_of_the_same_seed(experiment):
    control = experiment().carry_out()["set"]["control"]
    # (1 + seed + 2 + seed) / 2; the value before the resume does not count.
    assert [run.settings[WEIGHT] for run in control] == [2.5, 3.5]


def test_a_run_that_broke_is_named_and_goes_on(experiment, tmp_path):
    broken = experiment(variants={"loc": {}, "bad": {WEIGHT: 666.0}})
    with pytest.raises(UserError, match=r"2 of 4 runs failed: see .*bad/seed1/console.txt"):
        broken.carry_out()
    folder = tmp_path / "runs/set/bad/seed1"
    assert "it broke" in (folder / "console.txt").read_text()
    broken.carry_out()
    assert calls(folder) == ["started", "resumed"]
    assert json.loads((folder / "run.json").read_text())["attempts"] == 2
    assert calls(tmp_path / "runs/set/loc/seed1") == ["started"]


def test_what_needs_a_broken_run_is_left_out_and_the_rest_is_run(experiment, tmp_path):
    variants = {
        "bad": {WEIGHT: 666.0},
        "control": {WEIGHT: mean_of("bad")},
        "good": {},
    }
    with pytest.raises(UserError, match="2 of 4 runs failed"):
        experiment(variants=variants).carry_out()
    assert not (tmp_path / "runs/set/control").exists()
    assert calls(tmp_path / "runs/set/good/seed2") == ["started"]


def test_a_run_with_other_settings_is_not_mixed_in(experiment):
    experiment().carry_out()
    with pytest.raises(UserError, match=r"seed1 holds a run with other settings .*delete it, or"):
        experiment(variants={"loc": {"SOLVER.BASE_LR": 0.5}}).carry_out()


def test_a_record_of_other_settings_is_refused_before_the_runs(experiment, tmp_path):
    (tmp_path / "set-loc-seed1.json").write_text(json.dumps({"settings": {"SOLVER.BASE_LR": 9}}))
    with pytest.raises(UserError, match=r"set-loc-seed1\.json is of a run with other settings"):
        replace(experiment(), records=tmp_path).carry_out()
    assert not list(tmp_path.rglob("run.json"))


def test_the_held_out_part_is_drawn_once_and_leaves_the_rest(tmp_path, coco):
    (tmp_path / "detector.yaml").write_text("VERSION: 2\n")
    settings = hold_out(tmp_path / "detector.yaml", coco, 0.3, tmp_path / "parts")
    files = {name: json.loads(Path(f).read_text()) for name, f, _ in settings["DATASETS.COCO_JSON"]}
    rest, held_out = files[settings["DATASETS.TRAIN"][0]], files[settings["DATASETS.TEST"][0]]
    ids = [{image["id"] for image in part["images"]} for part in (rest, held_out)]
    assert (len(ids[0]), len(ids[1])) == (7, 3)
    assert ids[0] | ids[1] == set(range(10))
    for part, images in zip((rest, held_out), ids, strict=True):
        assert {a["image_id"] for a in part["annotations"]} == images
        assert len(part["annotations"]) == 2 * len(images)
    assert hold_out(tmp_path / "detector.yaml", coco, 0.3, tmp_path / "parts") == settings


def test_too_few_images_to_hold_out(tmp_path, coco):
    (tmp_path / "detector.yaml").write_text("VERSION: 2\n")
    with pytest.raises(UserError, match="10 images, too few to hold out 1%"):
        hold_out(tmp_path / "detector.yaml", coco, 0.01, tmp_path / "parts")


@pytest.fixture
def reproduce(tmp_path, monkeypatch):
    """tools/reproduce.py with the fake training; the exit code."""
    monkeypatch.setattr(reproduce_command, "Experiment", partial(Experiment, train=[str(FAKE)]))
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["reproduce.py", *arguments])
        handler = signal.getsignal(signal.SIGTERM)
        try:
            return run_command("reproduce")
        finally:
            signal.signal(signal.SIGTERM, handler)

    return call


def write_shapes(tmp_path, *names):
    """Test sets; the config keys of each."""
    rng = np.random.default_rng(0)
    data_sets = {}
    for name in names:
        file, unique = tmp_path / f"{name}.json", f"{name}_{tmp_path.name}"
        file.write_text(json.dumps(draw_truth(rng, 20).dataset))
        data_sets[name] = {
            "DATASETS.COCO_JSON": [[unique, str(file), str(tmp_path)]],
            "DATASETS.TEST": [unique],
        }
    return data_sets


def test_records_are_written_and_compared_without_detections(reproduce, tmp_path, capsys):
    protocol = {
        "description": "d", "config": "detector.yaml", "seeds": [1, 2], "memory_gib": 1,
        "data_sets": write_shapes(tmp_path, "a b", "c"),
        "variants": {"and": {ETA: 1.5}, "baseline": {ETA: 0.0}},
    }  # fmt: skip
    (tmp_path / "detector.yaml").write_text("VERSION: 2\n")
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(protocol, sort_keys=False))
    command = ["toy.yaml", "--records", "evidence", "--at-once", "2"]
    assert reproduce(*command) == 0
    assert "and against baseline on 2 data sets, 2 runs each: better" in capsys.readouterr().out
    records = sorted((tmp_path / "evidence").iterdir())
    assert [r.name for r in records[:2]] == ["a_b-and-seed1.json", "a_b-and-seed2.json"]
    assert len(records) == 8
    assert json.loads(records[0].read_text())["dataset"] == "a b"
    assert (tmp_path / "output/toy/forest_and.png").is_file()

    for folder in (tmp_path / "output/toy").glob("*/*/*/inference"):
        shutil.rmtree(folder)
    first = records[0].read_text()
    assert reproduce(*command) == 0, "needs no detections"
    assert records[0].read_text() == first
    shutil.rmtree(tmp_path / "output")
    assert reproduce(*command) == 0, "needs no folders: on another machine the records are enough"
    assert not list((tmp_path / "output").rglob("run.json"))

    protocol["variants"]["and"] = {ETA: 1.0}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(protocol, sort_keys=False))
    assert reproduce(*command) == 2
    assert "a_b-and-seed1.json is of a run with other settings" in capsys.readouterr().err


def test_does_it_help_on_my_data(reproduce, tmp_path, capsys):
    (settings,) = write_shapes(tmp_path, "mine").values()
    config = {
        "MODEL": {"META_ARCHITECTURE": "RetinaNet", "IOU_BALANCED": {"CLS_ETA": 2.0}},
        "DATASETS": {"COCO_JSON": settings["DATASETS.COCO_JSON"]},
    }
    config["DATASETS"]["TEST"] = settings["DATASETS.TEST"]
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config | {"VERSION": 2}))
    assert reproduce("--config-file", "my.yaml", "--seeds", "2") == 0
    printed = capsys.readouterr().out
    assert re.search(r"both beats baseline: AP \+", printed)
    assert re.search(r"both: (To find \+1.0 AP on this data set takes|More seeds alone)", printed)
    (data_set,) = settings["DATASETS.TEST"]
    runs = {
        str(file.parent.relative_to(tmp_path / "output/my" / data_set)): yaml.safe_load(
            file.read_text()
        )
        for file in (tmp_path / "output/my").rglob("run.yaml")
    }
    assert sorted(runs) == ["baseline/seed1", "baseline/seed2", "both/seed1", "both/seed2"]
    both, baseline = runs["both/seed2"]["MODEL"], runs["baseline/seed1"]["MODEL"]
    assert both["META_ARCHITECTURE"] == baseline["META_ARCHITECTURE"] == "IoUBalancedRetinaNet"
    plain = {"CLS_LOSS": "iou_balanced", "CLS_ETA": 0.0, "LOC_LAMBDA": 0.0, "LOC_WEIGHT": 0.0}
    assert both["IOU_BALANCED"] == {**plain, "CLS_ETA": 2.0, "LOC_LAMBDA": 1.5}
    assert baseline["IOU_BALANCED"] == plain

    config["SOLVER"] = {"MAX_ITER": 7}  # runs of the old config must not count
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config | {"VERSION": 2}))
    assert reproduce("--config-file", "my.yaml", "--seeds", "2") == 2
    assert "holds a run with other settings" in capsys.readouterr().err

    (tmp_path / "my.yaml").write_text("MODEL: {META_ARCHITECTURE: GeneralizedRCNN}\nVERSION: 2\n")
    assert reproduce("--config-file", "my.yaml") == 2
    assert "GeneralizedRCNN has no IoU-balanced losses" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"variants": {"v": {}}}, "one variant alone"),
        ({"memory_gib": 0}, "memory_gib: expected more than 0"),
        ({"config": "broken.yaml"}, "broken.yaml"),
    ],
)
def test_mistakes_are_found_before_the_first_run(reproduce, tmp_path, capsys, change, said):
    (tmp_path / "detector.yaml").write_text("VERSION: 2\n")
    (tmp_path / "broken.yaml").write_text("MODEL: [")
    protocol = {
        "description": "d", "config": "detector.yaml", "data_sets": {"s": {}}, "seeds": [1],
        "variants": {"v": {}, "w": {}}, "memory_gib": 1,
    }  # fmt: skip
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(protocol | change))
    assert reproduce("toy.yaml") == 2
    out, err = capsys.readouterr()
    assert said in err
    assert out == ""


def test_weights_may_be_an_address(tmp_path):
    (tmp_path / "my.yaml").write_text(
        "{MODEL: {META_ARCHITECTURE: FCOS}, DATASETS: {TEST: [a]}, VERSION: 2}"
    )
    protocol = protocol_of_config(str(tmp_path / "my.yaml"), 1, weights="detectron2://x/R-50.pkl")
    assert protocol.data_sets == {
        "a": {
            "MODEL.META_ARCHITECTURE": "IoUBalancedFCOS",
            "MODEL.WEIGHTS": "detectron2://x/R-50.pkl",
            "MODEL.IOU_BALANCED.LOC_WEIGHT_RULE": "running",
        }
    }


def test_a_rival_is_compared_with_the_plain_losses(tmp_path):
    (tmp_path / "my.yaml").write_text(
        "{MODEL: {META_ARCHITECTURE: IoUBalancedRetinaNet, IOU_BALANCED: {CLS_LOSS: varifocal, "
        "LOC_WEIGHT: 2.34}}, DATASETS: {TEST: [a]}, VERSION: 2}"
    )
    variants = protocol_of_config(str(tmp_path / "my.yaml"), 1).variants
    names = [f"MODEL.IOU_BALANCED.{x}" for x in ("CLS_LOSS", "CLS_ETA", "LOC_LAMBDA", "LOC_WEIGHT")]
    assert [variants["baseline"][name] for name in names] == ["iou_balanced", 0.0, 0.0, 0.0]
    assert [variants["both"][name] for name in names] == ["varifocal", 1.5, 1.5, 2.34]


def test_an_end_from_outside_ends_the_runs(tmp_path):
    """``kill`` on tools/reproduce.py leaves no training behind."""
    script = tmp_path / "train_net.py"
    script.write_text(
        "import os, pathlib, sys, time, yaml\n"
        "config = yaml.safe_load(open(sys.argv[2]))\n"
        "pathlib.Path(config['OUTPUT_DIR'], 'pid').write_text(str(os.getpid()))\n"
        "time.sleep(120)\n"
    )
    (tmp_path / "detector.yaml").write_text("VERSION: 2\n")
    (tmp_path / "toy.yaml").write_text(
        "{description: d, config: detector.yaml, data_sets: {s: {}}, variants: {v: {}, w: {}}, "
        "seeds: [1], memory_gib: 1}"
    )
    code = (
        "import sys; from iou_balanced_d2 import commands; from functools import partial\n"
        "from iou_balanced_d2.commands import reproduce\n"
        f"reproduce.Experiment = partial(reproduce.Experiment, train=[{str(script)!r}])\n"
        "sys.exit(commands.run_command('reproduce'))"
    )
    command = [sys.executable, "-c", code, "toy.yaml", "--output", "out", "--at-once", "1"]
    process = subprocess.Popen(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": ""})
    pid_file = tmp_path / "out/s/v/seed1/pid"
    wait_for(lambda: pid_file.exists() and pid_file.read_text(), seconds=120)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    pid = pid_file.read_text()
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), seconds=30)


@pytest.mark.slow  # two trainings
def test_the_trainings_are_those_of_train_net(tmp_path, own_config):
    """None of the fake ones of the other tests."""
    config = yaml.safe_load(own_config.read_text())
    config["SOLVER"] |= {"MAX_ITER": 2, "STEPS": [1]}
    own_config.write_text(yaml.safe_dump(config))
    command = [sys.executable, str(ROOT / "tools/reproduce.py"), "--config-file", "own.yaml"]
    command += ["--seeds", "1", "--records", "evidence"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "own, against baseline:" in done.stdout
    assert (tmp_path / "output/own/own/results.md").is_file()
    for variant in ("baseline", "both"):
        folder = tmp_path / "output/own/own" / variant / "seed1"
        assert json.loads((folder / "run.json").read_text())["exit_code"] == 0
        assert (folder / "model_final.pth").is_file()
        record = json.loads((tmp_path / f"evidence/own-{variant}-seed1.json").read_text())
        assert (record["variant"], record["seed"]) == (variant, 1)
        assert record["metrics"]["AP"] >= 0


def wait_for(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)

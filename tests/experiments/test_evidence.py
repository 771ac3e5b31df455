"""The record of a run."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from iou_balanced_d2.errors import UserError
from iou_balanced_d2.experiments.evidence import digest, record_of, write_record
from iou_balanced_d2.experiments.experiment import Experiment
from iou_balanced_d2.experiments.protocol import load_protocol

from ..analysis.drawn import draw_detections, draw_truth, write_run
from ..evaluation.by_pycocotools import metrics_by_pycocotools

ROOT = Path(__file__).parents[2]


@pytest.fixture
def finished(tmp_path):
    """A run's folder, and its AP by pycocotools."""
    rng = np.random.default_rng(0)
    coco = draw_truth(rng, 30)
    truth, name = tmp_path / "truth.json", f"shapes_{tmp_path.name}"
    truth.write_text(json.dumps(coco.dataset))
    detections = draw_detections(rng, coco)
    folder = write_run(tmp_path / "run", name, detections)
    (folder / "metrics.json").write_text('{"iteration": 9, "iou_balanced/w_loc": 2.5}\n')
    config = {
        "DATASETS": {"COCO_JSON": [[name, str(truth), str(tmp_path)]], "TEST": [name]},
        "SEED": 3, "SOLVER": {"MAX_ITER": 10}, "OUTPUT_DIR": str(folder),
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    record = {
        "name": "my shapes/both/seed3", "exit_code": 0, "seconds": 12.34, "settings": {},
        "command": [str(tmp_path)], "versions": {"torch": "2"}, "hardware": {"gpu": None},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))
    return folder, metrics_by_pycocotools(coco, detections)


def test_the_record_holds_what_the_evaluator_finds_and_no_path(finished, tmp_path):
    folder, expected = finished
    file = write_record(folder, tmp_path / "evidence")
    assert file.name == "my_shapes-both-seed3.json"
    text = file.read_text()
    assert str(tmp_path) not in text
    record = json.loads(text)
    assert (record["dataset"], record["variant"], record["seed"]) == ("my shapes", "both", 3)
    for name in ("AP", "AP50", "AP75", "AP95"):
        assert record["metrics"][name] == pytest.approx(expected[name], abs=1e-3)
    assert record["classes"]["class1"] == pytest.approx(expected["AP-class1"], abs=1e-3)
    assert record["measured"]["iou_balanced/w_loc"] == 2.5
    assert (record["iterations"], record["seconds"]) == (10, 12.3)
    assert record["versions"] == {"torch": "2"}


def test_the_digest_is_of_the_setting():
    config = {"SEED": 1, "OUTPUT_DIR": "/a", "MODEL": {"WEIGHTS": "/a/x.pkl", "DEPTH": 50}}
    same = {"SEED": 2, "OUTPUT_DIR": "/b", "MODEL": {"DEPTH": 50, "WEIGHTS": "/b/x.pkl"}}
    assert digest(config) == digest(same)
    assert digest(config) != digest({**same, "MODEL": {"DEPTH": 101}})


def test_a_run_that_was_cut_off_has_no_record(finished):
    folder, _ = finished
    (folder / "run.json").write_text('{"name": "a/b/seed1", "exit_code": 1}')
    with pytest.raises(UserError, match="not of a complete run"):
        record_of(folder)


def test_the_records_kept_are_of_the_protocol(tmp_path):
    """Else an experiment would not go on from them."""
    protocol = load_protocol(str(ROOT / "tools/protocols/many_cpu.yaml"))
    experiment = Experiment(protocol, tmp_path, 1, ROOT / "docs/evidence")
    files = list((ROOT / "docs/evidence").glob("*.json"))
    assert len(files) >= 13
    for file in files:
        name, variant, seed = file.stem.split("-")
        base, number = protocol.data_sets[name], int(seed.removeprefix("seed"))
        loc = experiment._run(name, "loc", number, base, {})  # the control's weight is its mean
        assert experiment._done(experiment._run(name, variant, number, base, {"loc": loc}))

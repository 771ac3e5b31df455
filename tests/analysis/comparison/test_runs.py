"""What is found of a run, and one line for what is not."""

from pathlib import Path

import pytest

from iou_balanced_d2.analysis.comparison.runs import Annotations, load_run
from iou_balanced_d2.errors import UserError

from ...command import forget_own_data
from ..drawn import write_run


@pytest.fixture
def run_directory(tmp_path, own_data):
    """A run on own data, with the config that detectron2 writes."""
    forget_own_data()
    run = write_run(tmp_path / "run", "own", [])
    (run / "config.yaml").write_text(
        f"DATASETS:\n  TEST: [own]\n  COCO_JSON: [[own, {own_data[0]}, {own_data[1]}]]\n"
        "  VOC_DIFFICULT: count\nMODEL:\n  OF_ANOTHER_PROJECT: 1\n"
    )
    yield run
    forget_own_data()


def test_data_sets_are_those_of_the_config(run_directory, own_data):
    run = load_run(run_directory)
    annotations = run.ground_truth["own"]
    assert annotations.difficult == "count"
    assert Path(annotations.path).parent == Path(own_data[0]).parent / "iou_balanced_cache"
    assert list(run.detections) == ["own"]
    assert run.detections["own"].endswith("run/inference/own/coco_instances_results.json")


def test_two_runs_may_spell_the_path_of_a_data_set_differently(run_directory, own_data, tmp_path):
    other = write_run(tmp_path / "other", "own", [])
    text = (run_directory / "config.yaml").read_text()
    spelled = str(Path(own_data[0]).parent / "." / ".." / Path(own_data[0]).parent.name)
    (other / "config.yaml").write_text(
        text.replace(own_data[0], f"{spelled}/{Path(own_data[0]).name}")
    )
    first, second = load_run(run_directory), load_run(other)
    files = [run.ground_truth["own"].path for run in (first, second)]
    assert Path(files[0]).read_bytes() == Path(files[1]).read_bytes()


def test_ground_truth_by_hand_goes_first(run_directory):
    run = load_run(run_directory, {"own": "other.json"})
    assert run.ground_truth == {"own": Annotations("other.json", "count")}


def test_a_file_of_detections():
    run = load_run(__file__, {"x": "truth.json"})
    assert run.detections == {"x": __file__}


def test_the_folder_of_detectron2s_own_scripts(tmp_path):
    (tmp_path / "inference").mkdir()
    file = tmp_path / "inference/coco_instances_results.json"
    file.write_text("[]")
    run = load_run(tmp_path, {"x": "truth.json"})
    assert run.detections == {"x": str(file)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "config.yaml not found: name the data sets by --ground-truth"),
        ("DATASETS: {TEST: [nowhere]}", "data set 'nowhere' is not registered"),
        ("DATASETS: {TEST: []}", "DATASETS.TEST is empty"),
        ("MODEL: {}", "not a run's config"),
        ("DATASETS: [", "not a run's config"),
        ("DATASETS: {NO_SUCH_KEY: 1}", "not a run's config"),
        ("DATASETS: {TEST: [x], VOC_DIFFICULT: skip}", "VOC_DIFFICULT must be"),
    ],
)
def test_faults_of_the_config(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(UserError, match=message) as error:
        load_run(tmp_path)
    assert "\n" not in str(error.value)


def test_faults_of_the_run(tmp_path, run_directory):
    (run_directory / "inference/own/coco_instances_results.json").unlink()
    with pytest.raises(UserError, match="evaluate the run first"):
        load_run(run_directory)
    with pytest.raises(UserError, match="not found"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="needs one --ground-truth NAME=FILE, got none"):
        load_run(__file__)

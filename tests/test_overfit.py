"""A toy training from scratch: the detector learns 8 drawn images by heart."""

import pytest

from iou_balanced_d2.data.demo import DemoSpec, ensure_demo_datasets
from iou_balanced_d2.model_zoo import get_config_file

from .command import run


def test_eight_images_are_learnt_by_heart(tmp_path):
    folder = ensure_demo_datasets(str(tmp_path), DemoSpec(num_train=8, num_val=1))
    data_set = ("eight", str(folder / "annotations/train.json"), str(folder / "train"))
    options = {
        "DATASETS.COCO_JSON": (data_set,),
        "DATASETS.TRAIN": ("eight",),
        "DATASETS.TEST": ("eight",),
        "SOLVER.MAX_ITER": 150,
        "SEED": 1,
        "OUTPUT_DIR": "out",
        # AP50 between 90 and 100, or exit code 1.
        "TEST.EXPECTED_RESULTS": [["bbox", "AP50", 95.0, 5.0]],
    }
    config = get_config_file("Demo/retinanet_demo_iou_balanced.yaml")
    words = [str(word) for pair in options.items() for word in pair]
    code, out, err = run("--config-file", config, *words, cwd=tmp_path)
    assert code == 0, (out + err)[-3000:]
    assert "Results verification passed" in out


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_demo_learns_what_it_promises(tmp_path, seed):
    """AP50 >= 60 and AP75 >= 25 on images not trained on, whatever the seed."""
    config = get_config_file("Demo/retinanet_demo_iou_balanced.yaml")
    expected = [["bbox", "AP50", 80.0, 20.0], ["bbox", "AP75", 62.5, 37.5]]
    words = ["SEED", seed, "OUTPUT_DIR", "out", "TEST.EXPECTED_RESULTS", expected]
    code, out, err = run("--config-file", config, *words, cwd=tmp_path, timeout=3000)
    assert code == 0, (out + err)[-3000:]
    assert "Results verification passed" in out

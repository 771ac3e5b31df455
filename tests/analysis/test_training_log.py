"""What a training has logged, also one that was killed and went on."""

import json

from iou_balanced_d2.analysis.curves import read_training_log


def test_the_later_value_of_an_iteration_counts(tmp_path):
    lines = [
        {"iteration": 39, "loss": 2.0, "lr": 0.1},
        {"iteration": 59, "loss": 1.5},
        {"iteration": 39, "loss": 1.0, "eta": "1 day"},
        {"iteration": 19, "loss": 4},
    ]
    (tmp_path / "metrics.json").write_text("".join(json.dumps(x) + "\n" for x in lines))
    log = read_training_log(tmp_path)
    assert log == {"loss": [(19, 4), (39, 1.0), (59, 1.5)], "lr": [(39, 0.1)]}


def test_lines_that_were_not_finished_are_skipped(tmp_path):
    torn = b'{"iteration": 39, "lo{"iteration": 59, "loss": 2.0}\n'
    others = b'[1]\n{"loss": 3.0}\n{"iteration": null, "loss": 3.0}\n{"iteration": 79, "\xff'
    (tmp_path / "metrics.json").write_bytes(b'{"iteration": 19, "loss": 1.0}\n' + torn + others)
    assert read_training_log(tmp_path) == {"loss": [(19, 1.0)]}


def test_no_file_is_nothing_logged(tmp_path):
    assert read_training_log(tmp_path) == {}

"""The report of an experiment, of runs whose files are made here."""

import json

import numpy as np
import pytest

from iou_balanced_d2.experiments.protocol import Protocol
from iou_balanced_d2.experiments.results import measures, write_results
from iou_balanced_d2.experiments.runs import Run

from ..analysis.drawn import draw_detections, draw_truth, write_run

LOG = [
    {"iteration": 19, "iou_balanced/w_loc": 2.0, "iou_balanced/loc_mean_weight": 1.0, "time": 3.0},
    {"iteration": 39, "iou_balanced/w_loc": 2.5, "iou_balanced/loc_mean_weight": 2.0, "time": 1.0},
    {"iteration": 59, "iou_balanced/mean_pos_iou": 0.75, "time": 2.0},
]


@pytest.fixture
def runs(tmp_path):
    rng = np.random.default_rng(0)
    coco = draw_truth(rng, 30)
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps(coco.dataset))
    found = {}
    for variant, noise in (("baseline", 0.1), ("both", 0.05)):
        found[variant] = []
        for seed in (1, 2):
            name = f"shapes_{tmp_path.name}"
            folder = tmp_path / variant / f"seed{seed}"
            write_run(folder, name, draw_detections(rng, coco, noise))
            lines = [*map(json.dumps, LOG), '{"iteration": 79, "ti']  # killed while writing
            (folder / "metrics.json").write_text("\n".join(lines))
            record = {"exit_code": 0, "peak_memory_mib": 100.0 * seed, "command": ["x"]}
            (folder / "run.json").write_text(json.dumps(record))
            (folder / "config.yaml").write_text(
                f"DATASETS:\n  COCO_JSON: [[{name}, {truth}, {tmp_path}]]\n  TEST: [{name}]\n"
            )
            found[variant].append(Run(f"{variant}/{seed}", folder, tmp_path, {"SEED": seed}))
    return found


def test_what_a_run_measured(runs):
    found = measures(runs["both"][1])
    assert found["iou_balanced/w_loc"] == 2.5, "the last"
    assert found["iou_balanced/loc_mean_weight"] == 1.5, "the mean"
    assert found["iou_balanced/mean_pos_iou"] == 0.75
    assert found["time"] == 2.0, "the median"
    assert found["peak_memory_mib"] == 200.0
    assert -1 <= found["score_iou_correlation"] <= 1


def test_the_report_holds_protocol_comparison_and_measures(runs, tmp_path):
    protocol = Protocol(
        name="toy",
        description="What for.",
        config=tmp_path,
        data_sets={"shapes": {}},
        variants={name: {} for name in runs},
        seeds=[1, 2],
        memory_gib=1.0,
    )
    comparison = write_results(protocol, "shapes", runs, tmp_path / "report")
    assert [side.name for side in comparison.sides] == ["baseline", "both"]
    text = (tmp_path / "report/results.md").read_text()
    assert text.startswith("# toy: shapes\n\n## Protocol\n\nWhat for.\n\nSeeds: 1, 2.")
    assert "\n## Comparison of runs" in text
    assert "| both      | 2.50" in text
    assert (tmp_path / "report/ap_over_iou.png").exists()
    content = json.loads((tmp_path / "report/results.json").read_text())
    assert content["comparison"]["sides"][1]["name"] == "both"
    (_, second) = content["runs"]["both"]
    assert second["command"] == ["x"]
    assert second["measured"]["iou_balanced/w_loc"] == 2.5

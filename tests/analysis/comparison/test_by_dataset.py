"""Variants on several data sets, from records of runs and from their detections."""

import json
import math
import re

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from iou_balanced_d2.analysis.comparison import compare_sides
from iou_balanced_d2.analysis.comparison.by_dataset import (
    METRICS,
    compare_records,
    compare_runs_by_dataset,
    write,
)
from iou_balanced_d2.analysis.plots import style
from iou_balanced_d2.errors import UserError

from ...command import ROOT
from ..drawn import draw_detections, draw_truth, write_run


def write_records(folder, *, sets=4, seeds=3, gain=1.0, variants=("base", "both"), of_seed=5.0):
    """Runs that differ by seed, by much, and by variant; AP90 is 0 in the first data set."""
    rng = np.random.default_rng(0)
    paths = []
    for d in range(sets):
        shift = rng.normal(0, of_seed, seeds)
        for v, variant in enumerate(variants):
            for seed in range(seeds):
                ap = 40 + v * gain + shift[seed] + rng.normal(0, 0.3)
                metrics = dict.fromkeys(METRICS, ap) | ({"AP90": 0.0} if d == 0 else {})
                record = {"dataset": f"set{d}", "variant": variant, "seed": seed}
                paths.append(folder / f"set{d}-{variant.replace('/', '_')}-{seed}.json")
                paths[-1].write_text(json.dumps(record | {"metrics": metrics}))
    return paths


def test_records_are_paired_by_seed(tmp_path):
    """With two variants it is Student's paired test."""
    paths = write_records(tmp_path)
    (against,) = compare_records(paths)
    assert (against.name, against.first) == ("both", "base")
    effect = against.effects["AP"][1]
    runs = [json.loads(p.read_text()) for p in paths if p.name.startswith("set1")]
    first, other = (
        [r["metrics"]["AP"] for r in runs if r["variant"] == v] for v in ("base", "both")
    )
    differences = np.subtract(other, first)
    assert effect.value == pytest.approx(differences.mean())
    assert effect.standard_error == pytest.approx(differences.std(ddof=1) / 3**0.5)
    assert (effect.freedom, effect.num_runs) == (2, 3)
    assert "both against base on 4 data sets: better: AP +" in against.verdict()


def test_a_baseline_is_the_reference_wherever_it_stands(tmp_path):
    (against,) = compare_records(write_records(tmp_path, variants=("all", "baseline")))
    assert (against.name, against.first) == ("all", "baseline")


def test_all_variants_tell_the_spread_of_seeds(tmp_path):
    paths = write_records(tmp_path, variants=("base", "both", "cls", "loc"), seeds=4)
    both, *_ = compare_records([p for p in paths if p.name != "set1-loc-3.json"])
    assert [e.freedom for e in both.effects["AP"]] == [9, 8, 9, 9]
    # 0.3 AP a run; two variants, four seeds.
    errors = [e.standard_error for e in both.effects["AP"]]
    assert np.mean(errors) == pytest.approx(0.3 * (2 / 4) ** 0.5, rel=0.25)


def test_a_variant_of_one_data_set_is_left_out(tmp_path, caplog):
    paths = write_records(tmp_path, variants=("base", "both", "cls"))
    found = compare_records([p for p in paths if "-cls-" not in p.name or "set0" in p.name])
    assert [against.name for against in found] == ["both"]
    assert "cls and base have 1 data set in common: two or more are needed; left out" in caplog.text


def test_a_variant_that_has_only_begun_does_not_stop_the_others(tmp_path, caplog):
    paths = write_records(tmp_path, variants=("base", "both", "cls"))
    found = compare_records([p for p in paths if "-cls-" not in p.name or "-cls-0" in p.name])
    assert [against.name for against in found] == ["both"]
    assert "set0: base and cls have 1 seed in common: two or more are needed" in caplog.text


def test_a_data_set_without_common_seeds_is_left_out_in_a_warning(tmp_path, caplog):
    paths = write_records(tmp_path)
    alone = {"set0-base-0.json", "set0-both-1.json", "set0-both-2.json"}
    (against,) = compare_records([p for p in paths if "set0" not in p.name or p.name in alone])
    assert [effect.name for effect in against.effects["AP"]] == ["set1", "set2", "set3"]
    assert "set0: base and both have no seed in common" in caplog.text


def test_what_no_run_finds_is_left_out(tmp_path):
    (against,) = compare_records(write_records(tmp_path))
    assert against.effects["AP90"][0].standard_error == 0
    assert len(against.pooled["AP90"].weights) == 3
    row = next(line for line in against.table().splitlines() if line.startswith("| set0"))
    assert row.rstrip("| ").endswith("–")


def test_the_report(tmp_path):
    found = compare_records(write_records(tmp_path, variants=("base", "both", "a/b c")))
    files = write(found, tmp_path / "report")
    names = {"forest_both.png", "forest_a_b_c.png", "by_dataset.md", "by_dataset.json"}
    assert {f.name for f in files} == names
    picture = matplotlib.image.imread(tmp_path / "report/forest_both.png")
    assert picture.shape[1] == 1600
    assert (picture[0] == 1).all(), "white"
    assert 0.01 < (picture[..., :3] != 1).any(axis=2).mean() < 0.5
    other = matplotlib.image.imread(tmp_path / "report/forest_a_b_c.png")
    for i, image in ((1, picture), (2, other)):  # in their colours of all other figures
        seen = [
            (abs(image[..., :3] - to_rgb(style(k)["color"])) < 0.01).all(axis=2) for k in (0, i)
        ]
        assert not seen[0].any()
        assert seen[1].sum() > 1000
    text = (tmp_path / "report/by_dataset.md").read_text()
    assert text.count("| **all, random effects**") == 2
    content = json.loads((tmp_path / "report/by_dataset.json").read_text())
    assert content["both"]["AP"]["pooled"]["random"]["p"] < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda paths: paths[:6], "have 1 data set in common"),
        (lambda paths: paths[:3], "two variants or more"),
        (lambda paths: [*paths, paths[0]], "a second record of set0, base, seed 0"),
        (lambda paths: [p for p in paths if "-both-2" not in p.name and "-both-1" not in p.name],
         "have no data set in common"),
    ],
)  # fmt: skip
def test_what_can_not_be_compared(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        compare_records(change(write_records(tmp_path)))


@pytest.mark.parametrize("content", [
    "[", "[]", '{"dataset": "a"}',
    '{"dataset": "a", "variant": "b", "seed": 1, "metrics": {"AP": "high"}}',
    '{"dataset": "a", "variant": "b", "seed": 1, "metrics": {"AP": 1.0}}',
])  # fmt: skip
def test_a_file_that_is_no_record(tmp_path, content):
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"x\.json: not"):
        compare_records([file])


@pytest.mark.parametrize("same_name", [False, True])
def test_runs_are_compared_on_their_own_data_sets(tmp_path, same_name):
    rng = np.random.default_rng(0)
    sides = {"base": [], "both": []}
    for d in "ab":
        coco, name = draw_truth(rng, 40), "a" if same_name else f"{d}_{tmp_path.name}"
        (tmp_path / f"{d}.json").write_text(json.dumps(coco.dataset))
        for side, noise in (("base", 0.1), ("both", 0.04)):
            for seed in range(2):
                detections = draw_detections(rng, coco, noise)
                run = write_run(tmp_path / f"{d}-{side}-{seed}", name, detections)
                (run / "config.yaml").write_text(
                    f"DATASETS:\n  COCO_JSON: [[{name}, {tmp_path}/{d}.json, {tmp_path}]]\n"
                    f"  TEST: [{name}]\n"
                )
                sides[side].append(str(run))
    (against,) = compare_runs_by_dataset(sides, resamples=200)
    names = [effect.name for effect in against.effects["AP"]]
    assert names == (["a", "a (2)"] if same_name else [f"{d}_{tmp_path.name}" for d in "ab"])
    of_a = compare_sides({n: runs[:2] for n, runs in sides.items()}, resamples=200)
    expected = of_a.differences["both"][0]
    effect = against.effects["AP"][0]
    assert effect[1:4] == (expected.value, expected.standard_error, expected.freedom)
    assert effect.num_runs == 2
    assert effect.of_images == expected.of_images <= effect.standard_error**2 + 1e-9
    assert math.isnan(against.pooled["AP"].prediction[0])
    assert against.pooled["AP"].fixed.low > 0


def test_the_zoo_shows_what_the_records_give():
    found = compare_records(sorted((ROOT / "docs/evidence").glob("*.json")))
    assert {"both", "loc"} <= {against.name for against in found}
    zoo = (ROOT / "MODEL_ZOO.md").read_text()
    for against in found:
        for effects in ("random effects", "fixed effect"):
            (row,) = (line for line in against.table().splitlines() if f"all, {effects}" in line)
            cells = re.findall(r"[+-][0-9.]+ \[[^]]+\]", row)
            assert len(cells) == 5
            assert f"({effects}) | {' | '.join(cells)} |" in zoo

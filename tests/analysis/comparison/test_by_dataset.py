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
    summary_table,
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
    assert "both against base on 4 data sets, 3 runs each: better: AP +" in against.verdict()


def test_a_baseline_is_the_reference_wherever_it_stands(tmp_path):
    (against,) = compare_records(write_records(tmp_path, variants=("all", "baseline")))
    assert (against.name, against.first) == ("all", "baseline")


def test_all_variants_tell_the_spread_of_seeds(tmp_path):
    paths = write_records(tmp_path, variants=("base", "both", "cls", "loc"), seeds=4)
    both, *_ = compare_records([p for p in paths if p.name != "set1-loc-3.json"])
    assert [e.freedom for e in both.effects["AP"]] == [9, 8, 9, 9]
    assert {e.freedom_of_run for e in both.effects["AP"]} == {3}, "of each seed more"
    # 0.3 AP a run; two variants, four seeds.
    errors = [e.standard_error for e in both.effects["AP"]]
    assert np.mean(errors) == pytest.approx(0.3 * (2 / 4) ** 0.5, rel=0.25)


def test_a_variant_of_one_data_set_is_left_out(tmp_path, caplog):
    paths = write_records(tmp_path, variants=("base", "both", "cls"))
    found = compare_records([p for p in paths if "-cls-" not in p.name or "set0" in p.name])
    assert [against.name for against in found] == ["both"]
    text = caplog.text
    assert "set3: base and cls have no seed in common" in text
    assert "set3 is left out for cls" in text
    assert "cls can be compared with base on 1 data set: two or more are needed; left out" in text


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
    others = [e.value for e in against.effects["AP90"][1:]]
    assert against.pooled["AP90"].random.value == pytest.approx(np.mean(others))
    row = next(line for line in against.table().splitlines() if line.startswith("| set0"))
    assert row.rstrip("| ").endswith("–")


@pytest.mark.parametrize("undefined", [None, math.nan, math.inf])
def test_an_undefined_value_leaves_out_its_own_variant_alone(tmp_path, undefined):
    paths = write_records(tmp_path, variants=("base", "both", "cls"))
    record = json.loads((tmp_path / "set1-cls-0.json").read_text())
    record["metrics"] |= {"AP": undefined}
    (tmp_path / "set1-cls-0.json").write_text(json.dumps(record))
    both, cls = compare_records(paths)
    assert [math.isfinite(e.value) for e in cls.effects["AP"]] == [True, False, True, True]
    assert [e.freedom for e in both.effects["AP"]] == [4, 3, 4, 4]
    defined = [e.value for e in cls.effects["AP"] if math.isfinite(e.value)]
    assert cls.pooled["AP"].random.value == pytest.approx(np.mean(defined))


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
    assert text.count("| **mean, data sets like these**") == 2
    summary = [re.split(r" *\| *", line)[1:4] for line in text.splitlines()[2:6]]
    one, other = (f"{a.pooled['AP'].random.value:+.1f}" for a in found)
    assert [[*row[:2], row[2].split()[0]] for row in summary[::2]] == [
        ["both", "like these", one], ["a/b c", "like these", other],
    ]  # fmt: skip
    assert [row[:2] for row in summary[1::2]] == [["4 data sets, 3 runs each", "these alone"]] * 2
    content = json.loads((tmp_path / "report/by_dataset.json").read_text())
    assert content["both"]["AP"]["pooled"]["random"]["p"] < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda paths: paths[:6], "both can be compared with base on 1 data set: two"),
        (lambda paths: paths[:3], "two variants or more"),
        (lambda paths: [*paths, paths[0]], "a second record of set0, base, seed 0"),
        (lambda paths: [p for p in paths if "-both-2" not in p.name and "-both-1" not in p.name],
         "both can be compared with base on no data set: two"),
    ],
)  # fmt: skip
def test_what_can_not_be_compared(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        compare_records(change(write_records(tmp_path)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"settings": {"DATASETS.TEST": ["other"]}},
            r"DATASETS\.TEST of set0 is \['other'\] in one",
        ),
        ({"iterations": 9}, "iterations of set0, both is 9 in one, 5 in the other"),
        ({"config": "b"}, "can't be compared: they were trained with different configs"),
    ],
)
def test_runs_that_are_not_alike(tmp_path, changed, message):
    paths = write_records(tmp_path)
    known = {"settings": {"DATASETS.TEST": ["test"]}, "iterations": 5, "config": "a"}
    for path in paths:
        new = changed if path.name == "set0-both-2.json" else {}
        path.write_text(json.dumps(json.loads(path.read_text()) | known | new))
    with pytest.raises(UserError, match=message):
        compare_records(paths)


def test_records_may_have_metrics_alone(tmp_path):
    paths = write_records(tmp_path)
    more = json.loads(paths[0].read_text()) | {"settings": {"DATASETS.TEST": ["a"]}, "config": "a"}
    paths[0].write_text(json.dumps(more))
    assert len(compare_records(paths)) == 1


def test_the_weight_of_a_control_differs_by_seed(tmp_path):
    paths = write_records(tmp_path)
    for path in paths:
        if "both" in path.name:
            settings = {"settings": {"LOC_WEIGHT": path.name}, "config": path.name}
            path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    assert len(compare_records(paths)) == 1


@pytest.mark.parametrize("content", [
    "[", "[]", '{"dataset": "a"}',
    '{"dataset": "a", "variant": "b", "seed": 1, "metrics": {"AP": "high"}}',
    '{"dataset": "a", "variant": "b", "seed": 1, "metrics": {"AP": 1.0}}',
    '{"dataset": "a", "variant": "b", "seed": 1, "metrics": {}, "settings": null}',
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
    assert effect.freedom_of_run == 2
    assert math.isnan(against.pooled["AP"].prediction[0])
    assert against.pooled["AP"].these.low > 0


RECORDS = sorted((ROOT / "docs/evidence").glob("*.json"))


def zoo_lines():
    return {" ".join(line.split()) for line in (ROOT / "MODEL_ZOO.md").read_text().splitlines()}


def test_the_zoo_shows_the_effects_of_the_records():
    table = summary_table(compare_records(RECORDS)).splitlines()
    rows = {" ".join(line.split()) for line in (table[0], *table[2:])}
    assert len(rows) >= 9
    assert rows <= zoo_lines()


def test_the_zoo_shows_the_means_of_the_records():
    runs = {}
    for record in (json.loads(file.read_text()) for file in RECORDS):
        runs.setdefault(record["dataset"], {}).setdefault(record["variant"], []).append(record)
    assert len(runs) == 6
    for name, variants in runs.items():
        assert variants.keys() == runs["bccd"].keys()
        ap = [[run["metrics"]["AP"] for run in of_variant] for of_variant in variants.values()]
        cells = [f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" for values in ap]
        measured = {v: [run["measured"] for run in found] for v, found in variants.items()}
        of_losses = measured["both"] + measured["loc"]
        cells.append(f"{np.mean([m['iou_balanced/w_loc'] for m in of_losses]):.2f}")
        for variant in ("baseline", "both"):
            mean = np.mean([m["score_iou_correlation"] for m in measured[variant]])
            cells.append(f"{mean:.3f}".removeprefix("0"))
        assert f"| {name} | {' | '.join(cells)} |" in zoo_lines()
    names = [*runs["bccd"], "w_loc", "correlation baseline", "both"]
    assert f"| AP | {' | '.join(names)} |" in zoo_lines()

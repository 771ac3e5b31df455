"""The comparison of runs as a user sees it."""

import json
import re
import sys

import numpy as np
import pytest

from iou_balanced_d2.analysis.comparison import compare_sides, write_comparison
from iou_balanced_d2.analysis.comparison.by_dataset import METRICS
from iou_balanced_d2.commands import compare_runs, run_command
from iou_balanced_d2.errors import UserError

from ..analysis.drawn import draw_detections, draw_truth, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ground truth, three plain runs, three better ones, and what goes wrong."""
    folder = tmp_path_factory.mktemp("compare")
    rng = np.random.default_rng(0)
    coco = draw_truth(rng, 60)
    (folder / "truth.json").write_text(json.dumps(coco.dataset))
    for i in range(3):
        write_run(folder / f"plain{i}", "shapes", draw_detections(rng, coco, 0.10))
        write_run(folder / f"better{i}", "shapes", draw_detections(rng, coco, 0.04))
    return folder


@pytest.fixture
def command(folder, monkeypatch, capsys):
    """Run the tool in the folder; returns exit code, stdout, stderr."""

    def run(*args, truth="shapes=truth.json"):
        monkeypatch.chdir(folder)
        argv = ["compare_runs.py", *args, "--resamples", "200", "--ground-truth", truth]
        monkeypatch.setattr(sys, "argv", argv)
        code = run_command("compare")
        return code, *capsys.readouterr()

    return run


def test_a_better_side_beats_the_first(command, folder):
    code, out, _ = command("plain*", "good=better0,better1,better2", "--output", "report")
    assert code == 0
    assert re.search(r"good beats plain: AP \+[\d.]+ \[[\d.]+, [\d.]+\], p (< )?\.00\d\.", out)
    report = folder / "report"
    names = {"comparison.md", "comparison.html", "comparison.json"}
    assert {f.name for f in report.iterdir()} == names | {"ap_over_iou.png", "ap_over_iou.svg"}
    content = json.loads((report / "comparison.json").read_text())
    plain, good = content["sides"]
    assert [len(side["runs"]) for side in (plain, good)] == [3, 3]
    aps = [run["metrics"]["AP"] for run in good["runs"]]
    assert good["mean"]["AP"] == pytest.approx(np.mean(aps))
    assert good["std"]["AP"] == pytest.approx(np.std(aps, ddof=1))
    difference = content["differences"]["good"]["AP"]
    assert difference["value"] == pytest.approx(good["mean"]["AP"] - plain["mean"]["AP"])
    assert difference["low"] < difference["value"] < difference["high"]
    assert content["differences"]["good"]["AP95"].keys() == difference.keys()
    assert "AP-class2" in content["differences"]["good"]


def test_the_page_holds_everything(command, folder):
    command("plain0", "better0", "--output", "page")
    page = (folder / "page/comparison.html").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") == 1
    for text in ("better0 beats plain0", "AP (primary)", "One run a side", "AP-class1"):
        assert text in page
    markdown = (folder / "page/comparison.md").read_text()
    assert "![AP over IoU thresholds" in markdown
    assert "| AP75 " in markdown


def test_a_run_against_itself(command):
    code, out, _ = command("plain0", "same=plain0")
    assert code == 0
    assert "same against plain0: AP +0.0, but how certain that is can't be told" in out


def test_detections_of_any_framework(command, folder):
    files = [f"plain{i}/inference/shapes/coco_instances_results.json" for i in range(2)]
    code, out, _ = command(f"a={files[0]}", f"b={files[1]}")
    assert code == 0
    _, of_runs, _ = command("a=plain0", "b=plain1")
    assert out == of_runs


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["plain0"], "name at least two sides"),
        (["plain0", "nowhere"], "run 'nowhere' not found"),
        (["plain0", "plain0"], "two sides are called 'plain0'"),
        (["plain0", "nothing*"], "no run fits 'nothing*'"),
        (
            ["plain0", "strange"],
            "detections[0]: image_id 999 is not among the ground truth's images",
        ),
        (["plain0", "broken"], "not a JSON file"),
        (["plain0", "list"], "detections[0] has no 'bbox'"),
        (["plain0", "plain1", "--resamples", "5"], "5 resamples tell nothing"),
        (["plain0", "plain1", "--ground-truth", "truth.json"], "expected NAME=FILE"),
        (["plain0", "plain1", "--ground-truth", "more=truth.json"], "evaluate the run first"),
    ],
)
def test_errors_are_one_line(command, folder, args, message):
    detection = {"image_id": 999, "category_id": 1, "bbox": [1, 1, 5, 5], "score": 0.5}
    for name, text in (("strange", json.dumps([detection])), ("broken", "[{"), ("list", "[1]")):
        run = folder / name
        if not run.exists():
            write_run(run, "shapes", [])
        (run / "inference/shapes/coco_instances_results.json").write_text(text)
    # The tool's own --resamples of the fixture comes later and would win.
    with pytest.raises(UserError, match="side 'b' has no run"):
        compare_sides({"a": ["plain0"], "b": []})
    if "--resamples" in args:
        sides = {name: [folder / name] for name in args[:2]}
        with pytest.raises(UserError, match=message):
            compare_sides(sides, resamples=5)
        return
    code, _, err = command(*args)
    assert code == 2
    assert err.count("\n") == 1
    assert err.startswith("compare_runs.py: error: ")
    assert message in err


@pytest.mark.parametrize("key", ["bbox", "score"])
@pytest.mark.parametrize("value", [None, "high", [[1], 2, 3, 4], float("nan")])
def test_bad_numbers_of_one_detection_are_named(command, folder, key, value):
    path = folder / "plain0/inference/shapes/coco_instances_results.json"
    rows = json.loads(path.read_text())
    rows[7][key] = value
    (folder / "bad.json").write_text(json.dumps(rows))
    code, _, err = command("bad.json", f"b={path}")
    assert code == 2
    assert err.startswith(f"compare_runs.py: error: bad.json: detections[7]: {key} ")
    assert err.count("\n") == 1


def test_sides_must_fit_together(folder, tmp_path, capsys, monkeypatch):
    """Runs whose configs name different data sets, policies or ground truths."""
    truth = json.loads((folder / "truth.json").read_text())
    for name in ("one", "two"):
        truth["images"][0]["width"] += 1
        (tmp_path / f"{name}.json").write_text(json.dumps(truth))

    def run(name, dataset, policy="ignore"):
        path = write_run(tmp_path / name, dataset, [])
        entry = [dataset, str(tmp_path / "one.json"), str(tmp_path)]
        datasets = {"TEST": [dataset], "COCO_JSON": [entry], "VOC_DIFFICULT": policy}
        (path / "config.yaml").write_text(json.dumps({"DATASETS": datasets}))
        return str(path)

    runs = [run("a", "fit_one"), run("b", "fit_two"), run("c", "fit_one", "drop")]
    for other, message in ((runs[1], "have different data sets"), (runs[2], "treat difficult")):
        monkeypatch.setattr(sys, "argv", ["compare_runs.py", runs[0], other])
        assert run_command("compare") == 2
        assert message in capsys.readouterr().err


def test_links_and_odd_file_names_are_taken_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"of_{name}/out").mkdir(parents=True)
        (tmp_path / name).symlink_to(f"of_{name}/out")
    (tmp_path / "p,q[1].json").write_text("[]")
    sides = compare_runs.sides_of(["a", "b", "p,q[1].json"])
    assert sides == {"a": ["a"], "b": ["b"], "p,q[1]": ["p,q[1].json"]}


def test_the_report_leads_to_those_on_alignment(folder):
    page = folder / "better1/inference/shapes/alignment/index.html"
    page.parent.mkdir(parents=True)
    page.write_text("")
    sides = {"a": [folder / "plain0"], "b": [folder / "better1"]}
    truth = {"shapes": str(folder / "truth.json")}
    comparison = compare_sides(sides, ground_truth=truth, resamples=100)
    write_comparison(comparison, folder / "linked")
    html = (folder / "linked/comparison.html").read_text()
    relative = "../better1/inference/shapes/alignment/index.html"
    assert html.count(f'href="{relative}"') == 1
    assert f"]({relative})" in (folder / "linked/comparison.md").read_text()


def test_one_run_spelled_two_ways_is_one(command, folder):
    (folder / "other_name").symlink_to("plain1")
    for again in ("./plain1", str(folder / "plain1"), "other_name"):
        code, _, err = command(f"a=plain0,plain1,{again}", "better0")
        assert code == 2
        assert err.count("\n") == 1
        assert "are one run" in err
    (folder / "other_name").unlink()
    assert compare_runs.parse_side("a\x1b\ud800=plain0")[0] == "a\ufffd\ufffd"


def test_sides_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("both_seed1", "both_seed2", "base", "odd=name"):
        (tmp_path / name).mkdir()
    assert compare_runs.parse_side("base/") == ("base", ["base"])
    assert compare_runs.parse_side("b=both_seed*") == ("b", ["both_seed1", "both_seed2"])
    assert compare_runs.parse_side("both_seed2,both_seed1") == (
        "both",
        ["both_seed2", "both_seed1"],
    )
    assert compare_runs.parse_side("odd=name") == ("odd=name", ["odd=name"])
    for text, message in (("none*", "no run fits 'none\\*'"), ("b=", "has no run")):
        with pytest.raises(UserError, match=message):
            compare_runs.parse_side(text)


def test_records_of_several_data_sets_are_pooled(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for d in "ab":
        for variant, gain in (("base", 0), ("both", 2)):
            for seed in (1, 2, 3):
                metrics = {m: 30 + gain + rng.normal(0, 0.2) for m in METRICS}
                record = {"dataset": d, "variant": variant, "seed": seed, "metrics": metrics}
                (tmp_path / f"{d}-{variant}-{seed}.json").write_text(json.dumps(record))
    report = tmp_path / "report"
    argv = ["compare_runs.py", "--by-dataset", f"{tmp_path}/*.json", "--output", str(report)]
    monkeypatch.setattr(sys, "argv", argv)
    assert run_command("compare") == 0
    out = capsys.readouterr().out
    assert "both against base on 2 data sets" in out
    assert "| **mean, data sets like these** |" in out
    assert (report / "forest_both.png").exists()
    monkeypatch.setattr(sys, "argv", [*argv, "--ground-truth", "a=b"])
    assert run_command("compare") == 2
    assert "--ground-truth" in capsys.readouterr().err


def test_records_are_not_mixed_with_runs_or_renamed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("run", "evidence"):
        (tmp_path / folder).mkdir()
    (tmp_path / "evidence/a-both-seed1.json").write_text("{}")
    for sides, message in (
        (["evidence"], "evidence holds records of runs: give evidence/*.json"),
        (["evidence/*", "run"], "run: runs can't be compared with records (evidence/a-both-"),
        (["new=evidence/*"], "new=evidence/*: a record has its own name, that of its variant"),
    ):
        monkeypatch.setattr(sys, "argv", ["compare_runs.py", "--by-dataset", *sides])
        assert run_command("compare") == 2
        assert message in capsys.readouterr().err

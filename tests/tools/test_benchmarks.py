"""The benchmarks compare implementations of the same thing, and say what they measured."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import benchmark_losses
import benchmarking
import pytest
import torch
from detectron2.modeling import RetinaNet
from detectron2.utils.events import EventStorage

from iou_balanced_d2.losses import LossOptions
from iou_balanced_d2.modeling import IoUBalancedLoss


@pytest.fixture
def case(monkeypatch):
    monkeypatch.setattr(benchmark_losses, "LEVEL_SIZES", (360, 90, 18))
    return benchmark_losses.Case(num_images=2, num_classes=4, num_pos=30, device="cpu")


def arguments(case):
    return case.anchors, case.logits, case.labels, case.deltas, case.gt


def test_the_dense_formulation_is_ours_level_by_level(case):
    """The author's code, written from the paper, is one more oracle of loss and gradient."""
    module = IoUBalancedLoss(
        num_classes=4,
        box2box_transform=case.transform,
        options=LossOptions(
            cls_norm_scope="level", loc_weight=benchmark_losses.W_LOC, normalizer="batch"
        ),
    )
    num_pos = sum(((x >= 0) & (x < 4)).sum() for x in case.labels)
    ours = {name: value * num_pos for name, value in module(*arguments(case)).items()}
    dense = benchmark_losses.dense_losses(case)
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=0)
    predictions = [*case.logits, *case.deltas]
    for a, b in zip(
        torch.autograd.grad(sum(ours.values()), predictions),
        torch.autograd.grad(sum(dense.values()), predictions),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_stand_in_is_stock_retinanet(case):
    plain = IoUBalancedLoss(
        num_classes=4,
        box2box_transform=case.transform,
        options=LossOptions(cls_eta=0.0, loc_lambda=0.0),
    )
    with EventStorage(0):
        stock = RetinaNet.losses(case.stock_module, *arguments(case))
    torch.testing.assert_close(plain(*arguments(case)), stock, rtol=1e-5, atol=0)


def test_ratios_are_taken_within_a_round():
    assert benchmarking.median_ratio([1.0, 30.0, 3.0], [2.0, 60.0, 4.0]) == 0.5
    calls = []
    steps = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = benchmarking.time_side_by_side(steps, "cpu", repeats=2)
    assert "".join(calls) == "ababab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_the_machine_is_busy_only_within():
    def children():
        path = Path(f"/proc/self/task/{threading.get_native_id()}/children")
        return set(path.read_text().split())

    before = children()
    with benchmarking.busy_processes(2):
        assert len(children() - before) == 2
    assert children() == before


def test_peak_memory_sees_what_is_freed_again():
    code = """
import benchmarking, torch
print(benchmarking.peak_extra_bytes(lambda: torch.ones(2**24).sum(), "cpu"))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=Path(benchmarking.__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    size = 4 * 2**24
    assert 0.9 * size < int(done.stdout) < 1.5 * size


def test_report_prints_a_table_and_writes_json(tmp_path, capsys):
    rows = [{"K": 80, "ours ms": 1.5}]
    benchmarking.report("Title", rows, "cpu", str(tmp_path / "out/figures.json"))
    assert "|   K |   ours ms |" in capsys.readouterr().out
    content = json.loads((tmp_path / "out/figures.json").read_text())
    assert content["rows"] == rows
    assert content["machine"]["torch"] == torch.__version__


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options"),
    [
        (
            "benchmark_losses.py",
            ["--images", "1", "--classes", "8", "--repeats", "1", "--busy", "1"],
        ),
        ("benchmark_step.py", ["--height", "64", "--width", "64", "--repeats", "1", "--busy"]),
        ("benchmark_evaluation.py", ["--images", "50"]),
    ],
)
def test_the_scripts_run(script, options, tmp_path):
    tools = Path(benchmarking.__file__).parent
    output = tmp_path / "figures.json"
    command = [sys.executable, str(tools / script), *options, "--output", str(output)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(output.read_text())["rows"]

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
from detectron2.structures import Boxes
from detectron2.structures.boxes import matched_pairwise_iou
from detectron2.utils.events import EventStorage
from fvcore.nn import sigmoid_focal_loss_jit, smooth_l1_loss
from torch.nn import functional as F

from iou_balanced_d2.losses import LossOptions
from iou_balanced_d2.modeling import IoUBalancedLoss


@pytest.fixture
def case(monkeypatch):
    monkeypatch.setattr(benchmark_losses, "LEVEL_SIZES", (360, 90, 18))
    return benchmark_losses.Case(num_images=2, num_classes=4, num_pos=30, device="cpu")


def arguments(case):
    return case.anchors, case.logits, case.labels, case.deltas, case.gt


def dense_losses(case):
    """Level by level, everything for all anchors, as in the paper's equations read literally."""
    labels, gt = torch.stack(case.labels), torch.stack(case.gt)
    start, loss_cls, loss_box = 0, 0.0, 0.0
    for anchors, logits, deltas in zip(case.anchors, case.logits, case.deltas, strict=True):
        part = slice(start, start + len(anchors))
        start += len(anchors)
        label, box = labels[:, part].reshape(-1), gt[:, part].reshape(-1, 4)
        anchor = anchors.tensor.repeat(len(labels), 1)
        delta = deltas.reshape(-1, 4)
        target = F.one_hot(label.clamp(min=0), case.num_classes + 1)[:, :-1].float()
        target = target * (label >= 0)[:, None]
        positive = target.sum(dim=1)
        with torch.no_grad():
            decoded = case.transform.apply_deltas(delta, anchor)
            iou = matched_pairwise_iou(Boxes(decoded), Boxes(box)).clamp(min=1e-6)
        focal = sigmoid_focal_loss_jit(
            logits.reshape(-1, case.num_classes), target, alpha=0.25, gamma=2.0
        )
        focal = focal * (label >= 0)[:, None]
        with torch.no_grad():
            powered = target * (iou**1.5)[:, None]
            total, balanced = (focal * target).sum(), (focal * powered).sum()
            weight = torch.where(target > 0, powered * (total / balanced.clamp(min=1e-9)), 1.0)
        loss_cls = loss_cls + (focal * weight).sum()
        encoded = case.transform.get_deltas(anchor, box)
        smooth = smooth_l1_loss(delta, encoded, beta=benchmark_losses.BETA, reduction="none")
        weight = benchmark_losses.W_LOC * iou**1.5 * positive
        loss_box = loss_box + (smooth * weight[:, None]).sum()
    return {"loss_cls": loss_cls, "loss_box_reg": loss_box}


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
    dense = dense_losses(case)
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

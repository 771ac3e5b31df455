"""The Triton kernels against the torch path: on the GPU, or in Triton's interpreter without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent


def compare(device):
    """Loss and gradient of both paths over types, powers, classes and block borders."""
    from iou_balanced_d2.losses import focal, focal_triton

    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        for gamma, rows, num_classes in ((2.0, 700, 7), (0.0, 5, 3), (2.5, 1, 1203), (2.0, 0, 4)):
            rng = torch.Generator().manual_seed(rows)
            logits = (torch.randn(rows, num_classes, generator=rng) * 4).to(dtype)
            if rows > 1:
                logits[0], logits[1] = 80, -80
            labels = torch.randint(-1, num_classes + 1, (rows,), generator=rng)
            targets = focal.focal_targets(labels, num_classes)
            weights = torch.rand(len(targets.rows), generator=rng) * 3
            exact = logits.double().requires_grad_()
            expected = focal.weighted_focal_sum(
                exact, targets, weights.double(), alpha=0.25, gamma=gamma
            )
            (expected * 0.01).backward()

            args = [x.to(device) for x in (logits, *targets, weights)]
            loss = focal_triton.focal_sum(*args, 0.25, gamma)
            scale = torch.tensor(0.01, device=device)
            grad = focal_triton.focal_grad(*args, 0.25, gamma, scale)
            torch.testing.assert_close(loss.cpu().double(), expected.detach(), rtol=2e-6, atol=0)
            assert grad.dtype == dtype
            torch.testing.assert_close(grad.cpu().double(), exact.grad, rtol=tolerance, atol=1e-7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_on_the_gpu():
    compare("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_loss_on_the_gpu_uses_the_kernels_and_is_deterministic():
    from iou_balanced_d2.losses import focal, sigmoid_focal_loss

    logits = torch.randn(50_000, 80, device="cuda", requires_grad=True)
    labels = torch.randint(-1, 81, (50_000,), device="cuda")
    losses = [sigmoid_focal_loss(logits, labels) for _ in range(3)]
    assert focal._triton_kernels() is not None
    assert losses[0] == losses[1] == losses[2]
    cpu = logits.detach().cpu().requires_grad_()
    expected = sigmoid_focal_loss(cpu, labels.cpu())
    torch.testing.assert_close(losses[0].cpu(), expected, rtol=1e-5, atol=0)
    losses[0].backward()
    expected.backward()
    torch.testing.assert_close(logits.grad.cpu(), cpu.grad, rtol=1e-4, atol=1e-7)


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    # The interpreter must be chosen before Triton is imported.
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    code = "from tests.losses.test_focal_triton import compare; compare('cpu')"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

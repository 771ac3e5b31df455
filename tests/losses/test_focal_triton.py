"""The Triton kernels against the torch path: on the GPU, or in Triton's interpreter without one."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent


def compare(device):
    """Loss and gradient of both paths over types, powers, classes and block borders."""
    from iou_balanced_d2.losses import focal, focal_triton

    # On a CPU, too, where the interpreter runs them.
    focal._kernels_for = lambda logits: None if logits.dtype == torch.float64 else focal_triton
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        for alpha, gamma, rows, num_classes in (
            (0.25, 2.0, 700, 7), (-1.0, 2.0, 90, 7), (1.0, 0.0, 5, 3), (0.25, 2.5, 1, 1203),
            (0.25, 2.0, 0, 4),
        ):  # fmt: skip
            rng = torch.Generator().manual_seed(rows)
            logits = (torch.randn(rows, num_classes, generator=rng) * 4).to(dtype)
            if rows > 1:
                logits[0], logits[1] = 80, -80
            labels = torch.randint(-1, num_classes + 1, (rows,), generator=rng)
            logits[labels < 0] = float("inf")
            targets = focal.focal_targets(labels, num_classes)
            weights = torch.rand(len(targets.rows), generator=rng) * 3
            exact, leaf = logits.double().requires_grad_(), logits.to(device).requires_grad_()
            expected = weighted_sum(exact, targets, weights.double(), alpha, gamma)
            loss = weighted_sum(leaf, targets, weights, alpha, gamma)
            torch.testing.assert_close(loss.cpu().double(), expected.detach(), rtol=2e-6, atol=0)
            grad, exact_grad = (
                torch.autograd.grad(x * 0.01, x_leaf)[0]
                for x, x_leaf in ((loss, leaf), (expected, exact))
            )
            assert grad.dtype == dtype
            torch.testing.assert_close(grad.cpu().double(), exact_grad, rtol=tolerance, atol=1e-7)


def weighted_sum(logits, targets, weights, alpha, gamma):
    from iou_balanced_d2.losses.focal import FocalTargets, focal_loss

    weights, *targets = (x.to(logits.device) for x in (weights, *targets))
    dense, levels = focal_loss(alpha, gamma), ([logits], [FocalTargets(*targets)])
    return dense.sum(*levels, dense.own_terms(*levels, weights).times(weights))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_on_the_gpu(monkeypatch):
    from iou_balanced_d2.losses import focal

    monkeypatch.setattr(focal, "_kernels_for", focal._kernels_for)  # put back afterwards
    compare("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_loss_on_the_gpu_uses_the_kernels_and_is_deterministic(monkeypatch):
    from iou_balanced_d2.losses import focal, sigmoid_focal_loss

    logits = torch.randn(50_000, 80, device="cuda", requires_grad=True)
    labels = torch.randint(-1, 81, (50_000,), device="cuda")
    kernels = focal._triton_kernels(logits.device)
    assert kernels is not None
    background_sum, calls = kernels.background_sum, []

    def counted(*inputs):
        calls.append(inputs)
        return background_sum(*inputs)

    monkeypatch.setattr(kernels, "background_sum", counted)
    losses = [sigmoid_focal_loss(logits, labels) for _ in range(3)]
    assert len(calls) == 3
    assert losses[0] == losses[1] == losses[2]
    cpu = logits.detach().cpu().requires_grad_()
    expected = sigmoid_focal_loss(cpu, labels.cpu())
    torch.testing.assert_close(losses[0].cpu(), expected, rtol=1e-5, atol=0)
    losses[0].backward()
    expected.backward()
    torch.testing.assert_close(logits.grad.cpu(), cpu.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("dtype", "on_gpu", "by_kernels"),
    [
        (torch.float32, True, True),
        (torch.float16, True, True),
        (torch.bfloat16, True, True),
        (torch.float64, True, False),
        (torch.float32, False, False),
    ],
)
def test_which_logits_go_to_the_kernels(monkeypatch, dtype, on_gpu, by_kernels):
    from iou_balanced_d2.losses import focal

    device = torch.device("cuda", 1)
    monkeypatch.setattr(focal, "_triton_kernels", lambda device: f"kernels of {device}")
    logits = SimpleNamespace(is_cuda=on_gpu, dtype=dtype, device=device)
    assert focal._kernels_for(logits) == ("kernels of cuda:1" if by_kernels else None)


def need_triton():
    """Skip below Triton 3.0: no interpreter of all that is used here, another way to compile."""
    pytest.importorskip("triton", "3.0", reason="Triton 3.0 or later is not installed")


def test_kernels_in_the_interpreter():
    need_triton()
    # The interpreter must be chosen before Triton is imported.
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    code = "from tests.losses.test_focal_triton import compare; compare('cpu')"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_a_gpu(capability, tmp_path, monkeypatch):
    """Down to machine code of the A100 and the H100, for each type of logits."""
    need_triton()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = f"from tests.losses.test_focal_triton import compile_for; compile_for({capability})"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compile_for(capability):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from iou_balanced_d2.losses import focal_triton

    scalars = {"size": "i32", "factor": "fp32", "gamma": "fp32"}
    for dtype in ("fp32", "fp16", "bf16"):
        for kernel, results in (
            (focal_triton._forward_kernel, {"partial_sums": "*fp32"}),
            (focal_triton._backward_kernel, {"grad_output": "*fp32", "grad": f"*{dtype}"}),
        ):
            signature = {
                "logits": f"*{dtype}", "row_class": "*i32", **results, **scalars,
                "K": "constexpr", "BLOCK": "constexpr",
            }  # fmt: skip
            source = ASTSource(fn=kernel, signature=signature, constexprs={"K": 80, "BLOCK": 2048})
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            assert len(compiled.asm["cubin"]) > 0

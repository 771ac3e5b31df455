"""Work divided among threads: the same results for any number, errors told, forks unharmed."""

import multiprocessing

import pytest
import torch

from iou_balanced_d2.losses import sigmoid_focal_loss
from iou_balanced_d2.threads import run_in_threads


def loss_and_gradient(num_threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    torch.manual_seed(0)
    logits = torch.randn(3000, 80, requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.randint(-1, 81, (3000,)))
    return loss, torch.autograd.grad(loss, logits)[0]


def test_the_loss_is_bit_by_bit_the_same_for_any_number_of_threads(monkeypatch):
    loss, grad = loss_and_gradient(1, monkeypatch)
    for num_threads in (2, 5):
        again, grad_again = loss_and_gradient(num_threads, monkeypatch)
        assert torch.equal(again, loss)
        assert torch.equal(grad_again, grad)


@pytest.mark.parametrize("num_threads", [1, 4])
def test_each_block_is_worked_on_once(num_threads):
    done = []
    run_in_threads(done.extend, list(range(1000)), num_threads)
    assert sorted(done) == list(range(1000))
    run_in_threads(done.extend, [], num_threads)
    assert len(done) == 1000


@pytest.mark.parametrize("num_threads", [1, 4])
def test_an_error_reaches_the_caller(num_threads):
    def work(blocks):
        for block in blocks:
            raise ValueError(f"block {block}")

    with pytest.raises(ValueError, match="block"):
        run_in_threads(work, [1, 2, 3, 4, 5], num_threads)


def test_inference_mode_goes_with_the_work(monkeypatch):
    with torch.inference_mode():
        loss, _ = plain = loss_of_many_rows(monkeypatch)
    assert torch.equal(loss, loss_of_many_rows(monkeypatch)[0])
    assert plain[1].is_inference()


def loss_of_many_rows(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    logits = torch.linspace(-5, 5, 240_000).view(3000, 80)
    return sigmoid_focal_loss(logits, torch.full((3000,), 80)), logits


def loss_in_a_fork(queue):
    torch.set_num_threads(1)  # as a data worker does
    queue.put(float(sigmoid_focal_loss(torch.zeros(3000, 80), torch.full((3000,), 80))))


def test_a_forked_process_can_compute_the_loss(monkeypatch):
    loss, _ = loss_of_many_rows(monkeypatch)
    assert loss > 0
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=loss_in_a_fork, args=(queue,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert queue.get() == pytest.approx(3000 * 80 * 0.75 * 0.25 * 0.693147, rel=1e-5)

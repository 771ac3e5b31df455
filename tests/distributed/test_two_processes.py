"""Two processes of one image each against one process of two images (gloo, CPU)."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ..modeling.test_iou_balanced_loss import make_batch, make_loss
from ..toy import assert_same_state


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def leave():
    dist.barrier()  # before torch 2.8 a group that is still at work may hang when it is destroyed
    dist.destroy_process_group()


def share(batch, rank):
    """The part of a batch of two images that one of two processes gets, with its own leaves."""
    anchors, logits, labels, deltas, gt = batch
    image = slice(rank, rank + 1)
    parts = [[x.detach()[image].clone().requires_grad_() for x in xs] for xs in (logits, deltas)]
    return anchors, parts[0], labels[image], parts[1], gt[image]


def steps(module, batches):
    """Run steps; return the losses of each, the last gradients, and the state."""
    out = []
    for batch in batches:
        losses = module(*batch)
        sum(losses.values()).backward()
        out.append({name: x.detach() for name, x in losses.items()})
    grads = [x.grad for x in (*batch[1], *batch[3])]
    return out, grads, module.training_state()


def worker(rank, port, folder, kwargs, seeds):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    batches = [share(make_batch(seed), rank) for seed in seeds]
    torch.save(steps(make_loss(**kwargs), batches), f"{folder}/{rank}.pt")
    leave()


def run_both(tmp_path, seeds=(0, 1), **kwargs):
    """(results of rank 0, of rank 1, of one process with both images)."""
    mp.start_processes(
        worker, (free_port(), str(tmp_path), kwargs, seeds), nprocs=2, start_method="fork"
    )
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    return *ranks, steps(make_loss(**kwargs), [make_batch(seed) for seed in seeds])


def check_equal(first, second, together):
    """Losses and gradients averaged over ranks, as DDP does, against those of one process."""
    for a, b, expected in zip(first[0], second[0], together[0], strict=True):
        for name in expected:
            torch.testing.assert_close((a[name] + b[name]) / 2, expected[name], rtol=1e-5, atol=0)
    for a, b, expected in zip(first[1], second[1], together[1], strict=True):
        # Each rank's own images: DDP divides by the number of ranks.
        torch.testing.assert_close(torch.cat([a, b]) / 2, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("rule", ["first", "running"])
def test_global_scope_is_one_process_with_the_whole_batch(tmp_path, rule):
    first, second, together = run_both(
        tmp_path, cls_norm_scope="global", normalizer="batch", loc_weight_rule=rule
    )
    check_equal(first, second, together)
    # The state is the same on every rank.
    assert_same_state(first[2], second[2])
    torch.testing.assert_close(
        first[2]["w_loc_measurement"]["w_loc"], together[2]["w_loc_measurement"]["w_loc"]
    )


def test_moving_average_is_of_the_mean_number_of_positives_over_ranks(tmp_path):
    """It starts at 100 whatever the number of processes; past that, losses follow one process."""
    first, second, together = run_both(tmp_path, seeds=[0] * 40, cls_norm_scope="global")
    assert first[2]["num_pos_ema"] == second[2]["num_pos_ema"]
    # One process counts both images' positives; two count half as many each, on average.
    start = 0.9**40 * 100
    mean = first[2]["num_pos_ema"] - start
    torch.testing.assert_close(2 * mean, together[2]["num_pos_ema"] - start)


def test_a_rank_without_positives_neither_hangs_nor_breaks(tmp_path):
    batch = make_batch()
    assert any((x >= 0).any() for x in batch[2])
    mp.start_processes(lonely_worker, (free_port(), str(tmp_path)), nprocs=2, start_method="fork")
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert_same_state(*states)
    assert states[0]["w_loc_measurement"]["w_loc"] > 1


def lonely_worker(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    anchors, logits, labels, deltas, gt = make_batch()
    if rank == 1:
        labels = [torch.full_like(x, 3) for x in labels]
    module = make_loss(cls_norm_scope="global")
    losses = module(anchors, logits, labels, deltas, gt)
    sum(losses.values()).backward()
    assert all(torch.isfinite(x.grad).all() for x in (*logits, *deltas))
    torch.save(module.training_state(), f"{folder}/{rank}.pt")
    leave()

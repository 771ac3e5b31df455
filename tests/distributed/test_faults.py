"""Faults during a training of two processes, through train_net.py.

This module is also the driver: FAULT names what :func:`main` does to one of the processes.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel

from iou_balanced_d2.commands import run_command, train_net
from iou_balanced_d2.engine import Trainer, trainer
from iou_balanced_d2.engine import main as train_main
from iou_balanced_d2.engine.checkpoint import RobustCheckpointer
from iou_balanced_d2.engine.faults import user_error
from iou_balanced_d2.engine.signals import ONE_SIGNAL
from iou_balanced_d2.engine.train_step import share

from ..command import ROOT
from ..engine.test_resume import stream
from ..projects.test_fcos import tiny_fcos
from ..toy import toy_inputs, toy_model
from .test_launch import wait_for, workers_of
from .test_two_processes import free_port

LIMIT = 60  # seconds after which something hangs, on a loaded machine


def nan_loss():
    """The box loss of rank 1 is NaN at iteration 2."""
    build = Trainer.build_model.__func__

    def built(cls, cfg):
        model = build(cls, cfg)
        steps = []

        def spoil(module, args, losses):
            steps.append(None)
            if len(steps) == 3 and comm.get_rank() == 1:
                losses["loss_box_reg"] = losses["loss_box_reg"] * float("nan")

        model.register_forward_hook(spoil)
        return model

    Trainer.build_model = classmethod(built)


def unreadable_image():
    """Rank 1 has truncated images, which its data worker reads."""
    load = trainer.load_training_dicts

    def truncated(cfg):
        dicts = load(cfg)
        for d in dicts if comm.get_rank() == 1 else ():
            path = Path("truncated", Path(d["file_name"]).name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(Path(d["file_name"]).read_bytes()[:60])
            d["file_name"] = str(path)
        return dicts

    trainer.load_training_dicts = truncated


def signal_in_a_step():
    """Rank 1 alone gets SIGTERM in iteration 2; rank 0 gets two more while it saves."""
    step, save = Trainer.run_step, RobustCheckpointer.save

    def run_step(self):
        if self.iter == 2 and comm.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self)

    def slow_save(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.1 * ONE_SIGNAL)  # sooner, the two are one
        os.kill(os.getpid(), signal.SIGTERM)
        save(self, *args, **kwargs)

    Trainer.run_step = run_step
    if comm.is_main_process():
        RobustCheckpointer.save = slow_save


def signal_in_an_evaluation():
    """Rank 1 alone gets SIGTERM in an evaluation."""
    if comm.get_rank() == 1:
        _at_test(lambda: os.kill(os.getpid(), signal.SIGTERM))


def long_evaluation():
    """Each rank says that its evaluation has begun, and would take minutes."""

    def wait():
        print("evaluating", flush=True)
        for _ in range(10 * LIMIT):
            time.sleep(0.1)

    _at_test(wait)


def nothing():
    """No fault but what the test does."""


def _at_test(action):
    test = Trainer.test.__func__

    def tested(cls, *args):
        action()
        return test(cls, *args)

    Trainer.test = classmethod(tested)


def main(cfg, args):
    """What each process runs in the place of the package's own."""
    torch.manual_seed(0)
    globals()[os.environ["FAULT"]]()
    return train_main(cfg, args)


def command():
    """train_net.py with :func:`main`."""
    train_net.main = main
    return run_command("train")


def start(fault, config, *args):
    """Start the driver with two processes on the CPU."""
    code = "import sys; from tests.distributed.test_faults import command; sys.exit(command())"
    env = {**os.environ, "FAULT": fault, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
           "OMP_NUM_THREADS": "1"}  # fmt: skip
    words = ["--config-file", config, "--num-gpus", 2, *args, "MODEL.DEVICE", "cpu"]
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=config.parent, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(*args):
    """(exit code, stdout, stderr) of :func:`start`."""
    process = start(*args)
    try:
        out, err = process.communicate(timeout=4 * LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def state(path):
    return torch.load(path, weights_only=True)


def errors(err):
    return [line for line in err.splitlines() if "error:" in line]


def test_nan_on_one_rank_stops_both_before_the_weights_change(own_config):
    code, out, err = run("nan_loss", own_config, "SOLVER.CHECKPOINT_PERIOD", 1)
    assert code == 2, err
    (line,) = errors(err)
    pattern = (
        r"loss_box_reg is nan at iteration 2 \(learning rate [\de.-]+\) on rank 1, "
        r"images images/\d\.png: lower SOLVER\.BASE_LR .*SOLVER\.CLIP_GRADIENTS.*"
        r"tools/check_dataset\.py"
    )
    assert re.search(pattern, line), line
    assert "Traceback" not in out + err
    folder = own_config.parent / "out"
    assert (folder / "last_checkpoint").read_text() == "model_0000001.pth"
    weights = state(folder / "model_0000001.pth")["model"]
    assert all(torch.isfinite(x).all() for x in weights.values())


def test_an_unreadable_image_of_one_rank_stops_both(own_config):
    code, out, err = run("unreadable_image", own_config, "DATALOADER.NUM_WORKERS", 1)
    assert code == 2, err
    (line,) = errors(err)
    pattern = r"data set 'own': image 'truncated/\d\.png' can't be used: "
    assert re.search(pattern, line), line
    assert "Traceback" not in out + err


def test_signals_to_one_rank_stop_both_where_nothing_is_lost(own_config):
    """In a step both stop after it; in an evaluation the agent then stops rank 0 as well."""
    words = ("SOLVER.MAX_ITER", 8, "TEST.EVAL_PERIOD", 5, "SOLVER.CHECKPOINT_PERIOD", 100)
    folder = own_config.parent / "out"
    code, out, err = run("signal_in_a_step", own_config, *words)
    assert code == 128 + signal.SIGTERM, err
    assert (out + err).count("stopped by SIGTERM at iteration 2; --resume goes on") == 1
    assert "Traceback" not in out + err
    assert state(folder / "model_0000002.pth")["iteration"] == 2

    code, out, err = run("signal_in_an_evaluation", own_config, "--resume", *words)
    assert "Starting training from iteration 3" in out
    assert code == 128 + signal.SIGTERM, err
    assert not errors(err)
    assert "Traceback" not in out + err
    assert (folder / "last_checkpoint").read_text() == "model_0000004.pth"
    saved = state(folder / "model_0000004.pth")
    assert saved["iteration"] == saved["trainer"]["iteration"] == 4


def test_an_evaluation_of_two_processes_is_broken_off_at_once(own_config):
    """As by a machine that is taken away: the signal goes to the command that was started."""
    words = ("SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 2)
    process = start("long_evaluation", own_config, *words)
    try:
        text = ""
        while text.count("evaluating") < 2:  # both may be in one line
            line = process.stdout.readline()
            assert line, process.stderr.read()
            text += line
        process.terminate()
        out, err = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, err
    assert out.count("stopped by SIGTERM at iteration 1; --resume goes on") == 1
    assert "Traceback" not in out + err, out + err
    folder = own_config.parent / "out"
    assert (folder / "last_checkpoint").read_text() == "model_0000001.pth"
    assert state(folder / "model_0000001.pth")["iteration"] == 1


@pytest.mark.slow  # 30 s of waiting
def test_a_stopped_process_ends_the_run_after_the_time_out(own_config):
    """It could not be ended by a signal, and the launching process waited for it."""
    words = ("--dist-timeout", 5, "SOLVER.MAX_ITER", 100_000, "SOLVER.CHECKPOINT_PERIOD", 3)
    process = start("nothing", own_config, *words, "SOLVER.STEPS", "(99999,)")
    try:
        wait_for((own_config.parent / "out/last_checkpoint").exists, process)
        os.kill(workers_of(process.pid)[1], signal.SIGSTOP)
        out, err = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    assert process.returncode == 2, err
    assert "another process has not answered within --dist-timeout, as it hangs or" in out + err
    assert "(--dist-timeout)" in errors(err)[-1]
    assert "Traceback" not in out + err


def two_ranks(rank, port, folder):
    """Steps of each detector with no object on rank 1, on no rank; then rank 1 is killed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for model in (
        toy_model(),
        toy_model("MODEL.IOU_BALANCED.CLS_NORM_SCOPE", "global"),
        tiny_fcos(),
    ):
        ddp = DistributedDataParallel(model.train(), broadcast_buffers=False)
        for empty in (False, True, True):
            inputs = toy_inputs() if rank == 0 and not empty else toy_inputs((), ())
            losses = ddp([inputs])
            assert all(torch.isfinite(x) for x in losses.values())
            ddp.zero_grad()
            sum(losses.values()).backward()
            for name, p in model.named_parameters():
                assert p.grad is not None, name
                assert torch.isfinite(p.grad).all(), name
            if not empty:
                total = sum(p.grad.abs().sum() for p in model.parameters())
                both = [torch.zeros(()), torch.zeros(())]
                dist.all_gather(both, total)
                assert both[0] == both[1] > 0
    # Losses, seconds, and a signal of one rank.
    losses = {"loss_cls": torch.tensor(1.0 + rank), "loss_box_reg": torch.tensor(0.5)}
    report = share(losses, 0.3 - 0.2 * rank, signal.SIGINT if rank == 1 else None)
    assert report == ({"loss_cls": 1.5, "loss_box_reg": 0.5}, 0.3, signal.SIGINT)
    losses["loss_cls"] *= float("inf") if rank else 1.0
    assert share(losses, 0.0, None).losses == {"loss_cls": float("inf"), "loss_box_reg": 0.5}
    check_stream(rank)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError) as caught:
        dist.all_reduce(torch.zeros(10))
    (folder / "message").write_text(str(user_error(caught.value)))


def check_stream(rank):
    """Workers change nothing of the data, and each rank has randomness of its own."""
    words = ("SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS")
    own = stream(*words, 0)
    assert stream(*words, 1) == own
    draws = [None, None]
    dist.all_gather_object(draws, {sample[1] for batch in own for sample in batch})
    assert not draws[0] & draws[1]


def test_ranks_without_positives_train_and_one_reports_the_other_killed(tmp_path):
    context = mp.start_processes(
        two_ranks, (free_port(), tmp_path), nprocs=2, join=False, start_method="fork"
    )
    for process in context.processes:
        process.join(timeout=3 * LIMIT)
    assert [p.exitcode for p in context.processes] == [0, -signal.SIGKILL]
    message = (tmp_path / "message").read_text()
    assert message.startswith("lost the connection to another process (")
    assert "\n" not in message
    assert message.endswith("--resume goes on from the last checkpoint")

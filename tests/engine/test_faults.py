"""Errors in one line, logs on a full disk, and what the processes share in a step."""

import ast
import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.evaluation import DatasetEvaluators, inference_on_dataset
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import nn

from iou_balanced_d2.engine.faults import lost_connection, user_error
from iou_balanced_d2.engine.signals import ONE_SIGNAL, Stopped, StopSignals
from iou_balanced_d2.engine.train_step import StepTrainer, share
from iou_balanced_d2.errors import UserError

from ..command import ROOT
from ..toy import THIN

MUCH = 10**15  # bytes


class Thrifty(nn.Module):
    """Asks for more memory than there is."""

    def forward(self, _):
        return torch.empty(MUCH, dtype=torch.uint8)


def error_of(function, *args):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        function(*args)
    return caught.value


def test_out_of_memory_names_the_settings_to_lower():
    for error in (
        error_of(Thrifty(), None),
        error_of(np.empty, MUCH),
        OSError(errno.ENOMEM, "Cannot allocate memory"),  # of a fork
    ):
        message = str(user_error(error))
        assert message.startswith("out of memory: lower SOLVER.IMS_PER_BATCH (and SOLVER.BASE_LR")
        assert "INPUT.MAX_SIZE_TRAIN" in message
    gpu = str(user_error(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to ...\nsee")))
    assert gpu.startswith("out of memory on the GPU: lower SOLVER.IMS_PER_BATCH")
    assert gpu.endswith("SOLVER.AMP.ENABLED True")


def test_out_of_memory_in_an_evaluation_names_its_own():
    error = error_of(inference_on_dataset, Thrifty(), [None], DatasetEvaluators([]))
    message = str(user_error(error))
    assert "INPUT.MIN_SIZE_TEST" in message
    assert "SOLVER.IMS_PER_BATCH" not in message


def test_a_training_out_of_memory_is_one_line(own_config):
    """Address space for images far larger than the process may have."""
    code = (
        "import resource, sys, iou_balanced_d2.commands.train_net\n"
        "from pathlib import Path\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 10**9,) * 2)\n"
        "sys.exit(iou_balanced_d2.commands.run_command('train'))"
    )
    size = ["INPUT.MIN_SIZE_TRAIN", "(6000,)", "INPUT.MAX_SIZE_TRAIN", "6000"]
    code, out, err = run_code(code, own_config, *size)
    assert code == 2, err
    assert "Traceback" not in out + err
    assert err.splitlines()[-1].startswith(
        "train_net.py: error: out of memory: lower SOLVER.IMS_PER_BATCH"
    )


def write_to(path):
    with open(path, "w") as f:
        f.write("x" * 10)


def test_a_full_disk_names_the_file():
    """The system does so only where a file is opened."""
    error = error_of(write_to, "/dev/full")
    assert error.filename is None
    assert str(user_error(error)).startswith(
        "'/dev/full' can't be written: no space left on the disk; make room, --resume goes on"
    )
    quota = OSError(errno.EDQUOT, "Disk quota exceeded", "out/x")
    assert str(user_error(quota)).startswith("'out/x' can't be written: the disk quota is used up")


@pytest.mark.parametrize(
    "message",
    [
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:9",
        "[gloo/transport/tcp/pair.cc:547] Read error [10.0.0.2]:4711: Connection reset by peer",
        "[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation",
        "NCCL communicator was aborted on rank 1.\nOriginal reason for failure was: ...",
    ],
)
def test_a_lost_connection_is_reported_with_torch_s_first_line(message):
    shown = str(user_error(RuntimeError(message)))
    assert shown.startswith("lost the connection to another process (")
    assert re.sub(r"^\[\S+:\d+\] ", "", message.splitlines()[0]) in shown
    assert "\n" not in shown
    assert ".cc:" not in shown
    assert ("(--dist-timeout)" in shown) == ("Timed out" in message)


def test_the_last_error_of_nccl_is_reported():
    message = (
        "NCCL error in: NCCLUtils.hpp:275, unhandled system error, NCCL version 2.19.3\n"
        "ncclSystemError: System call (e.g. socket, malloc) failed.\nLast error:\n"
        "socketStartConnect: Connect to 10.0.0.2<35041> failed\n"
    )
    shown = lost_connection(RuntimeError(message))
    assert shown.endswith("2.19.3: socketStartConnect: Connect to 10.0.0.2<35041> failed")


def test_torch_s_own_errors_of_connections_are_known():
    for name in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        kind = getattr(torch.distributed, name, None)
        if kind is not None:
            assert lost_connection(kind("first\nsecond")) == "first"


def test_weights_that_have_diverged_are_said_to():
    """detectron2's own assertion."""
    boxes = Boxes(torch.tensor([[0.0, 0.0, float("nan"), 1.0]]))
    with pytest.raises(AssertionError) as caught:
        boxes.clip((4, 4))
    assert "weights have diverged: lower SOLVER.BASE_LR" in str(user_error(caught.value))


def test_a_killed_worker_is_reported():
    message = "DataLoader worker (pid 12) is killed by signal: Killed. "
    assert "lower DATALOADER.NUM_WORKERS" in str(user_error(RuntimeError(message)))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        ValueError("NCCL"),
        OSError(errno.ENOENT, "No such file or directory", "x"),
        KeyError("x"),
        RuntimeError("Default process group has not been initialized"),
    ],
)
def test_other_errors_keep_their_traceback(error):
    assert user_error(error) is None


def test_a_user_s_error_from_a_worker_is_its_last_line():
    text = "Caught UserError in ...\nTraceback ...\niou_balanced_d2.errors.UserError: image 'x'"
    assert str(user_error(UserError(text))) == "image 'x'"


FULL = """
import logging, os, sys
from iou_balanced_d2.commands import run_command
from iou_balanced_d2.engine import Trainer
train = Trainer.train
def train_on_a_full_disk(trainer):
    (log,) = [x.stream for x in logging.getLogger("detectron2").handlers if x.stream != sys.stdout]
    os.dup2(os.open("/dev/full", os.O_WRONLY), log.fileno())
    return train(trainer)
Trainer.train = train_on_a_full_disk
build = Trainer.build_writers
def build_on_a_full_disk(trainer):
    os.symlink("/dev/full", os.path.join(trainer.cfg.OUTPUT_DIR, "metrics.json"))
    return build(trainer)
Trainer.build_writers = build_on_a_full_disk
sys.exit(run_command("train"))
"""


def run_code(code, config, *words):
    """Run Python code as if it were train_net.py; (exit code, stdout, stderr)."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code, "--config-file", str(config), *words]
    done = subprocess.run(
        command, cwd=config.parent, env=env, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


def test_a_full_disk_for_the_logs_is_a_warning_and_the_training_ends_well(own_config):
    """Full from the moment that the training begins."""
    folder = own_config.parent / "out"
    code, out, err = run_code(FULL, own_config, *map(str, THIN))
    assert code == 0, err
    assert out.count("JSONWriter's file in OUTPUT_DIR can't be written: [Errno 28] No space") == 1
    assert "Logging error" not in err
    assert (folder / "model_final.pth").exists()
    assert "loss_box_reg" in out


class Given(nn.Module):
    """Losses that depend on a weight of 1."""

    def __init__(self, **losses):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.losses = losses

    def forward(self, _):
        return {name: self.weight * value for name, value in self.losses.items()}


def one_step(kind, model, batch=()):
    """(the scalars logged, the trainer)"""
    trainer = kind(model, iter([batch]), torch.optim.SGD(model.parameters(), 0.5))
    trainer.iter = 7
    with EventStorage(7) as storage:
        trainer.run_step()
    return storage.latest(), trainer


@pytest.mark.parametrize("losses", [{"loss_cls": 0.7, "loss_box_reg": 0.1}, {"loss": 3.0}])
def test_scalars_and_weights_are_detectron2s(losses):
    expected, _ = one_step(SimpleTrainer, stock := Given(**losses))
    logged, _ = one_step(StepTrainer, ours := Given(**losses))
    assert logged.keys() == expected.keys() | {"rank_data_time"}
    for name in logged.keys() - {"data_time", "rank_data_time"}:
        assert logged[name][0] == pytest.approx(expected[name][0], rel=1e-15)
        assert logged[name][1] == expected[name][1] == 7
    assert torch.equal(ours.weight, stock.weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_is_named_and_the_weights_stay(value):
    model = Given(loss_cls=1.0, loss_box_reg=value)
    with pytest.raises(UserError) as caught:
        one_step(StepTrainer, model, [{"file_name": "a.jpg"}, {"file_name": "b.jpg"}])
    assert str(caught.value).startswith(
        f"loss_box_reg is {value} at iteration 7 (learning rate 0.5) on rank 0, images a.jpg, "
        "b.jpg: lower SOLVER.BASE_LR"
    )
    assert model.weight == 1


def test_signals_are_shared_with_the_losses():
    losses = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}
    assert share(losses, 0.5, None) == ({"a": 1.0, "b": 2.0}, 0.5, None)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        assert share(losses, 0.5, signum).signum == signum


def test_signals_are_ignored_while_stopping():
    """Also a later one of the same kind, which ended the process before; so in one of its own."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            with StopSignals() as signals:
                os.kill(os.getpid(), signal.SIGTERM)
                with pytest.raises(Stopped):
                    signals.check()
                signals._when -= 2 * ONE_SIGNAL
                for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                    os.kill(os.getpid(), signum)
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_interruptible_function_stops_for_an_earlier_signal():
    done = []
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Stopped):
            signals.interruptible(lambda: done.append(1))()
    assert not done


def test_every_test_that_the_table_of_faults_names_exists():
    text = (ROOT / "docs/robustness.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 20
    for file, name in named:
        tree = ast.parse(Path(ROOT / file).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{file}::{name}"

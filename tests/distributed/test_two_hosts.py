"""Two hosts without a common file system, two processes each: a training, or a clear error.

Starting processes is slow, so each test checks several things.
"""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from detectron2.utils import comm
from torch.nn.parallel import DistributedDataParallel

from iou_balanced_d2.commands import run_command
from iou_balanced_d2.commands import train_net as train_net_module
from iou_balanced_d2.engine.config import load_config
from iou_balanced_d2.engine.trainer import Trainer

from ..toy import toy_batch
from .namespaces import two_hosts

ROOT = Path(__file__).parents[2]
DRIVER = [
    "-c",
    "import sys; from tests.distributed.test_two_hosts import train_net; sys.exit(train_net())",
]
PORT = 29400
LAST, SAVED = 8, 4  # iterations of a training, and after how many it writes a checkpoint
FIRST_CHECKPOINT = f"model_{SAVED - 1:07d}.pth"
ENDLESS = ["SOLVER.MAX_ITER", 1_000_000, "SOLVER.CHECKPOINT_PERIOD", 1_000_000]
# Seconds in which a run must end on a loaded machine, after a fault and if it must not start; far
# less than the default of --dist-timeout.
PATIENCE = 90
PATIENCE_TO_START = 240


class RecordingTrainer(Trainer):
    """Writes each process's iteration to a file, and its weights at the end."""

    def run_step(self):
        super().run_step()
        path = Path(self.cfg.OUTPUT_DIR) / f"rank{comm.get_rank()}"
        text = json.dumps({"pid": os.getpid(), "iteration": self.iter})
        path.with_suffix(".tmp").write_text(text)
        path.with_suffix(".tmp").rename(path.with_suffix(".json"))

    def train(self):
        results = super().train()
        weights = getattr(self.model, "module", self.model).state_dict()
        torch.save(weights, Path(self.cfg.OUTPUT_DIR) / f"rank{comm.get_rank()}.pt")
        return results


def recording_main(cfg, args):
    """``main`` in each process, with the trainer above."""
    module = importlib.import_module("iou_balanced_d2.engine.main")
    module.Trainer = RecordingTrainer
    return module.main(cfg, args)


def train_net():
    """``train_net.py`` with that ``main``."""
    sys.argv[0] = "train_net.py"
    train_net_module.main = recording_main
    return run_command("train")


def write_data(folder):
    """Ten images of 64 x 64: a bright square or a dark one, or both."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(10):
        image = rng.integers(90, 130, (64, 64, 3), dtype=np.uint8)
        for category in ((1,), (2,), (1, 2))[i % 3]:
            x, y, size = (int(v) for v in rng.integers((2, 2, 24), (30, 30, 33)))
            image[y : y + size, x : x + size] = (230, 20)[category - 1]
            annotations.append({"id": len(annotations) + 1, "image_id": i, "iscrowd": 0,
                                "category_id": category, "bbox": [x, y, size, size],
                                "area": size * size})  # fmt: skip
        cv2.imwrite(str(folder / "images" / f"{i}.png"), image)
        images.append({"id": i, "file_name": f"{i}.png", "height": 64, "width": 64})
    categories = [{"id": 1, "name": "bright"}, {"id": 2, "name": "dark"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "train.json").write_text(json.dumps(content))


def write_host(folder):
    """A host's own copy of config and data, in a folder of its own name."""
    data = folder / f"data-of-{folder.name}"
    write_data(data)
    content = {
        "_BASE_": str(ROOT / "configs/COCO-Detection/retinanet_R_50_FPN_1x_iou_balanced.yaml"),
        "MODEL": {
            "WEIGHTS": "initial.pth",
            "BACKBONE": {"FREEZE_AT": 0},
            # Batch normalisation would see two images where one process sees eight.
            "RESNETS": {"DEPTH": 18, "RES2_OUT_CHANNELS": 64, "NORM": "GN"},
            "FPN": {"OUT_CHANNELS": 32, "NORM": "GN"},
            "RETINANET": {"NUM_CLASSES": 2, "NUM_CONVS": 1, "SCORE_THRESH_TEST": 0.0},
            "IOU_BALANCED": {"CLS_NORM_SCOPE": "global", "NORMALIZER": "batch"},
        },
        "DATASETS": {
            "COCO_JSON": [["own", str(data / "train.json"), str(data / "images")]],
            "TRAIN": ["own"],
            "TEST": ["own"],
        },
        "DATALOADER": {"NUM_WORKERS": 0, "ASPECT_RATIO_GROUPING": False},
        "INPUT": {"MIN_SIZE_TRAIN": [64], "MIN_SIZE_TEST": 64},
        "SOLVER": {
            "IMS_PER_BATCH": 8,
            "REFERENCE_WORLD_SIZE": 0,
            "BASE_LR": 0.001,
            "WARMUP_ITERS": 2,
            "STEPS": [6],
            "MAX_ITER": LAST,
            "CHECKPOINT_PERIOD": SAVED,
            "CLIP_GRADIENTS": {"ENABLED": True, "CLIP_TYPE": "full_model", "CLIP_VALUE": 1.0},
        },
        "SEED": 1,
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(content))


def environment():
    """Without what the machine may set for launching."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_", "GLOO_"))}
    own = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {**kept, **own, "GLOO_SOCKET_IFNAME": "eth0"}  # the hosts' names lead nowhere


def train_alone(folder, *words):
    """Run the driver as one process; what it printed."""
    command = [sys.executable, *DRIVER, "--config-file", "own.yaml", *words]
    done = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def lone(tmp_path_factory):
    """The folder of one process that trained with the whole batch, from weights kept there."""
    folder = tmp_path_factory.mktemp("lone")
    write_host(folder)
    torch.manual_seed(0)
    cfg = load_config(str(folder / "own.yaml"), ["MODEL.DEVICE", "cpu"])
    torch.save({"model": Trainer.build_model(cfg).state_dict()}, folder / "initial.pth")
    train_alone(folder, "OUTPUT_DIR", "out")
    return folder


@pytest.fixture
def network():
    with two_hosts() as network:
        yield network


class Machine:
    """One of the hosts with its own folder, and the command that runs there."""

    def __init__(self, host, folder):
        self.host = host
        self.folder = folder / host.name
        self.output = self.folder / f"out-of-{host.name}"
        write_host(self.folder)

    def start(self, words):
        command = [*words, "OUTPUT_DIR", self.output.name]
        log = self.folder / "printed.txt"
        self.process = self.host.start(command, cwd=self.folder, env=environment(), output=log)

    @property
    def printed(self):
        return (self.folder / "printed.txt").read_text()

    def progress(self, rank):
        """The process id of a rank and the iteration it has done; None before the first."""
        path = self.output / f"rank{rank}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def weights(self):
        """Of each rank of this machine."""
        return [torch.load(path) for path in sorted(self.output.glob("rank?.pt"))]


@pytest.fixture
def machines(network, tmp_path):
    return [Machine(host, tmp_path) for host in network.hosts]


def by_flags(machines, *words, processes=2, other=(), num_machines=(2, 2), timeout=600):
    """Start train_net.py on both machines; ``other`` is for the second one only."""
    url = f"tcp://{machines[0].host.address}:{PORT}"
    for rank, machine in enumerate(machines):
        flags = [
            "--num-gpus", processes, "--num-machines", num_machines[rank], "--machine-rank", rank,
            "--dist-url", url, "--dist-timeout", timeout, "--config-file", "own.yaml",
        ]  # fmt: skip
        machine.start([sys.executable, *DRIVER, *flags, *words, *(other if rank else ())])


def by_torchrun(machines, *words):
    """Start train_net.py under torchrun on both machines."""
    for rank, machine in enumerate(machines):
        flags = [
            "--nnodes", 2, "--node-rank", rank, "--nproc-per-node", 2,
            "--master-addr", machines[0].host.address, "--master-port", PORT, "--no-python",
        ]  # fmt: skip
        torchrun = [sys.executable, "-m", "torch.distributed.run", *flags]
        machine.start([*torchrun, sys.executable, *DRIVER, "--config-file", "own.yaml", *words])


def ends(machines, within):
    """Wait for both machines' commands; their exit codes. Nothing may be left running."""
    until = time.monotonic() + within
    try:
        codes = [m.process.wait(max(until - time.monotonic(), 0)) for m in machines]
        while any(m.host.processes() for m in machines):
            assert time.monotonic() < until, [m.host.processes() for m in machines]
            time.sleep(0.1)
    except (subprocess.TimeoutExpired, AssertionError):
        print(*(m.printed for m in machines), sep="\n")
        raise
    return codes


def wait_for_iteration(machines, iteration, within=200):
    """Wait until each of the four processes has done some iterations."""
    until = time.monotonic() + within
    told = [None]
    while not all(x and x["iteration"] >= iteration for x in told):
        ended = [m.printed for m in machines if m.process.poll() is not None]
        assert not ended, ended
        assert time.monotonic() < until, [m.printed for m in machines]
        time.sleep(0.1)
        told = [machines[rank // 2].progress(rank) for rank in range(4)]


def check_trained(machines, lone):
    """All four ranks have the weights of the one process, which are not those it began with."""
    first, *others = ranks = [weights for m in machines for weights in m.weights()]
    assert len(ranks) == 4
    for weights in others:
        torch.testing.assert_close(weights, first, rtol=0, atol=0)
    expected = torch.load(lone / "out/rank0.pt")
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
    initial = torch.load(lone / "initial.pth")["model"]
    assert distance(first, expected) < 1e-2 * distance(expected, initial)
    assert max((expected[k] - initial[k]).abs().max() for k in initial) > 100 * 1e-5


def distance(weights, others):
    """Euclidean, over all parameters."""
    return sum((weights[k] - others[k]).double().square().sum() for k in weights).sqrt()


def metrics(printed):
    """The evaluation's line of numbers, as it is printed for copying."""
    return re.findall(r"copypaste: ([\d.,nan]+)$", printed, flags=re.MULTILINE)[-1]


def error_of(machine):
    """The one line that a run ends with."""
    lines = [
        line for line in machine.printed.splitlines() if line.startswith("train_net.py: error")
    ]
    assert len(lines) == 1, machine.printed
    assert "Traceback" not in machine.printed
    return lines[0]


def test_trained_by_flags_as_by_one_process(machines, lone):
    """The weights that it starts from, and all that is written later, are on host 0 only."""
    shutil.copy(lone / "initial.pth", machines[0].folder)
    by_flags(machines)
    assert ends(machines, within=300) == [0, 0], [m.printed for m in machines]
    check_trained(machines, lone)
    assert (machines[0].output / "model_final.pth").exists()
    assert not list(machines[1].output.glob("*.pth"))

    final = machines[0].output / "model_final.pth"
    alone = train_alone(lone, "--eval-only", "OUTPUT_DIR", "evaluated", "MODEL.WEIGHTS", final)
    assert metrics(machines[0].printed) == metrics(alone)
    assert float(metrics(alone).split(",")[0]) > 0, "an AP of 0 would show nothing"
    found = "inference/own/coco_instances_results.json"
    assert json.loads((machines[0].output / found).read_text()) == json.loads(
        (lone / "evaluated" / found).read_text()
    )


def test_resumed_by_torchrun_from_the_checkpoint_of_host_0(machines, lone):
    """Neither host has the weights that the training began with, host 1 no checkpoint."""
    machines[0].output.mkdir()
    shutil.copy(lone / "out" / FIRST_CHECKPOINT, machines[0].output)
    (machines[0].output / "last_checkpoint").write_text(FIRST_CHECKPOINT)
    by_torchrun(machines, "--resume")
    assert ends(machines, within=300) == [0, 0], [m.printed for m in machines]
    assert f"Starting training from iteration {SAVED}" in machines[0].printed
    check_trained(machines, lone)


def test_a_killed_process_ends_the_run_on_both_hosts(machines, lone):
    shutil.copy(lone / "initial.pth", machines[0].folder)
    by_flags(machines, *ENDLESS)
    wait_for_iteration(machines, 2)
    os.kill(machines[1].progress(3)["pid"], signal.SIGKILL)
    codes = ends(machines, within=PATIENCE)
    assert 0 not in codes
    assert "lost the connection to another process" in error_of(machines[0])
    assert "process 3 of 4 was killed by SIGKILL" in error_of(machines[1])


@pytest.mark.slow
def test_a_cut_cable_ends_the_run_on_both_hosts(network, machines, lone):
    shutil.copy(lone / "initial.pth", machines[0].folder)
    by_flags(machines, *ENDLESS, timeout=12)
    wait_for_iteration(machines, 2)
    network.cut()
    assert ends(machines, within=PATIENCE) == [2, 2]
    for machine in machines:
        assert "lost the connection to another process" in error_of(machine)


def test_hosts_of_different_configs_do_not_start(machines, lone):
    shutil.copy(lone / "initial.pth", machines[0].folder)
    batch = ["SOLVER.IMS_PER_BATCH", 12]
    by_flags(machines, *batch, other=["SOLVER.BASE_LR", 0.5], num_machines=(2, 3))
    assert ends(machines, within=PATIENCE_TO_START) == [2, 2], [m.printed for m in machines]
    for machine in machines:
        assert error_of(machine).endswith(
            "rank 2 on host-b disagrees with rank 0 on host-a: "
            "--num-machines is 3 there, 2 here; SOLVER.BASE_LR is 0.5 there, 0.001 here"
        )


def fcos_step(images, wrap=lambda model: model):
    """Losses of an FCOS on some images, and its gradients."""
    # Not for each process of the trainings, which import this file, too.
    from ..projects.test_fcos import forward_backward, tiny_fcos

    keys = "MODEL.IOU_BALANCED.CLS_NORM_SCOPE", "global", "MODEL.IOU_BALANCED.NORMALIZER", "batch"
    model = tiny_fcos("MODEL.RESNETS.NORM", "GN", *keys)
    losses, _ = forward_backward(wrap(model), images)
    losses = {name: loss.detach() for name, loss in losses.items()}
    return losses, {name: p.grad for name, p in model.named_parameters()}


def fcos_worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    image = toy_batch()[rank : rank + 1]
    torch.save(fcos_step(image, DistributedDataParallel), f"{folder}/{rank}.pt")
    dist.barrier()  # before torch 2.8 a group that is still at work may hang when it is destroyed
    dist.destroy_process_group()


def test_fcos_in_two_processes_is_that_of_one(tmp_path):
    """Of the two images, one for each process, one has no object."""
    mp.start_processes(fcos_worker, (str(tmp_path),), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    losses, grads = fcos_step(toy_batch())
    for name, loss in losses.items():
        mean = (ranks[0][0][name] + ranks[1][0][name]) / 2
        torch.testing.assert_close(mean, loss, rtol=1e-5, atol=0)
    for _, given in ranks:
        torch.testing.assert_close(given, grads, rtol=1e-4, atol=1e-6)

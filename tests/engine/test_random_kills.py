"""A training killed at random moments, and started again each time, ends as one never killed."""

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ..toy import THIN
from .test_resume import check_equal, load

ROOT = Path(__file__).parents[2]
PERIOD = 2
OPTIONS = [
    *THIN, "MODEL.IOU_BALANCED.LOC_WEIGHT_STEPS", 10, "MODEL.EMA.ENABLED", True,
    "MODEL.EMA.DECAY", 0.9, "INPUT.MIN_SIZE_TRAIN", "(40, 48, 56)",
    "SOLVER.STEPS", "(20,)", "SOLVER.WARMUP_ITERS", 10, "SOLVER.BASE_LR", 0.0005,
    "SOLVER.CHECKPOINT_PERIOD", PERIOD, "TEST.EVAL_PERIOD", 8,
]  # fmt: skip
# A disk on which each file, and each name, takes a while to arrive.
SLOW_DISK = """
import os, time
fsync = os.fsync
def slow(descriptor):
    time.sleep(0.05)
    fsync(descriptor)
os.fsync = slow
"""


class Training:
    """The command, in a session of its own."""

    def __init__(self, config, output, *options):
        self.folder = config.parent / output
        site = config.parent / "slow_disk"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(SLOW_DISK)
        env = {**os.environ, "PYTHONPATH": f"{site}:{ROOT}", "CUDA_VISIBLE_DEVICES": "",
               "OMP_NUM_THREADS": "1"}  # fmt: skip
        flags = ["--resume", "--config-file", config, *options]
        words = map(str, [*flags, *OPTIONS, "OUTPUT_DIR", output])
        self.log = open(config.parent / f"{output}.txt", "a")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "train_net.py"), *words],
            cwd=config.parent, env=env, stdout=self.log, stderr=self.log, start_new_session=True,
        )  # fmt: skip

    def alive(self):
        """Processes of the session that run; a killed one stays in the list until it is reaped."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, _, session = path.read_text().rsplit(") ", 1)[1].split()[:4]
                if int(session) == self.process.pid and state != "Z":
                    found.append(int(path.parent.name))
        return found

    def started(self):
        """The processes that do the work, where the command has started such."""
        found = []
        for pid in self.alive():
            with contextlib.suppress(OSError):
                if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text():
                    found.append(pid)
        return found

    def wait_for(self, moment, seconds=300):
        """Wait for a moment; False if the training has ended before it."""
        end = time.monotonic() + seconds
        while not moment():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < end, "the moment never came"
            time.sleep(0.0005)
        return True

    def kill(self, who):
        """Kill the command alone, all, or one it has started; nothing of it goes on."""
        targets = self.alive() if who == "all" else [self.process.pid]
        if who == "started":
            targets = self.started()[-1:] or targets
        for pid in targets:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self.process.wait(150) != 0
        end = time.monotonic() + 150
        while left := self.alive():
            assert time.monotonic() < end, f"processes go on without the command: {left}"
            time.sleep(0.05)
        self.log.close()

    def finish(self):
        code = self.process.wait(600)
        self.log.close()
        assert code == 0, Path(self.log.name).read_text()[-3000:]


def names(folder):
    return set(os.listdir(folder)) if folder.is_dir() else set()


def unfinished(folder):
    return any(folder.glob(".*.unfinished"))


def tag(folder):
    """What is resumed from; "" for nothing yet."""
    file = folder / "last_checkpoint"
    return file.read_text() if file.exists() else ""


def evaluations(folder):
    log = folder / "log.txt"
    return log.read_text().count("Start inference on") if log.exists() else 0


def moment_of(kind, folder):
    """What to wait for from now on."""
    before, evaluated = tag(folder), evaluations(folder)
    if kind == "start":
        return lambda: True
    if kind == "step":
        return lambda: tag(folder) not in ("", before)
    if kind == "writing":
        return lambda: unfinished(folder)
    if kind == "not named":  # the file is there, but last_checkpoint is of the one before
        old = names(folder)
        return lambda: any(n.startswith("model_0") for n in names(folder) - old)
    if kind == "evaluation":
        return lambda: evaluations(folder) > evaluated
    return (folder / "model_final.pth").exists


def check_whole(folder):
    """Whatever the moment was, a whole file is named; returns its iteration."""
    if not (name := tag(folder)):
        return -1
    content = load(folder / name)
    assert content.keys() == {"model", "trainer", "iou_balanced", "data", "ema", "iteration"}
    assert name in (f"model_{content['iteration']:07d}.pth", "model_final.pth")
    return content["iteration"]


PLAN = {"start": 2, "step": 6, "writing": 6, "not named": 2, "evaluation": 3}
LONGEST_DELAY = {"start": 4.0, "step": 0.4, "evaluation": 0.3, "end": 0.4}  # seconds


def kill_often(config, output, kills, rng, who, *options):
    """Kill at random moments, at the end of the training once; then let it end."""
    kinds = list(itertools.chain(*([kind] * number for kind, number in PLAN.items())))
    rng.shuffle(kinds)
    reached, partial = [], 0
    for kind in [*kinds[: kills - 1], "end"]:
        training = Training(config, output, *options)
        moment = moment_of(kind, training.folder)
        assert training.wait_for(moment), Path(training.log.name).read_text()[-3000:]
        time.sleep(rng.uniform(0, LONGEST_DELAY.get(kind, 0)))
        training.kill(rng.choice(who))
        partial += unfinished(training.folder)
        reached.append(check_whole(training.folder))
    print(f"{kills} kills; the iterations resumed from: {reached}; {partial} files unfinished")
    assert reached == sorted(reached), "nothing that was saved is lost"
    Training(config, output, *options).finish()
    assert not unfinished(training.folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("kills", "options", "who"),
    [
        (20, ["SOLVER.MAX_ITER", 120], ["command"]),
        (10, ["SOLVER.MAX_ITER", 80, "DATALOADER.NUM_WORKERS", 2], ["command", "all"]),
        (6, ["--num-gpus", "2", "SOLVER.MAX_ITER", 50], ["command", "all", "started"]),
    ],
    ids=["one process", "data workers", "two processes"],
)
def test_killed_often_is_never_killed_bit_for_bit(own_config, kills, options, who, seed):
    folder = own_config.parent
    Training(own_config, "whole", *options).finish()
    kill_often(own_config, "killed", kills, random.Random(100 * seed + kills), who, *options)
    for name in ("model_final.pth", "model_ema.pth"):
        check_equal(load(folder / "killed" / name), load(folder / "whole" / name))

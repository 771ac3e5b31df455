"""A long training holds as much memory, and as many files, at its end as near its beginning."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..toy import THIN

ROOT = Path(__file__).parents[2]
STEPS = 2000
OPTIONS = [
    *THIN, "MODEL.EMA.ENABLED", True, "INPUT.MIN_SIZE_TRAIN", "(40, 48, 56)",
    "DATALOADER.NUM_WORKERS", 2, "SOLVER.MAX_ITER", STEPS, "SOLVER.STEPS", "()",
    "SOLVER.BASE_LR", 0.0005, "SOLVER.CHECKPOINT_PERIOD", 100, "TEST.EVAL_PERIOD", 100,
    "VIS_PERIOD", 100,
]  # fmt: skip


@dataclass
class Sample:
    """What a process holds after an iteration."""

    iteration: int
    resident: int  # bytes
    files: int


def session_of(pid):
    """The processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rsplit(") ", 1)[1].split()[3]) == pid:
                found.append(int(path.parent.name))
    return found


def take(pid, iteration):
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return Sample(iteration, pages * os.sysconf("SC_PAGE_SIZE"), files)


def last_iteration(metrics):
    """Of what has been logged: every 20 iterations."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return json.loads(lines[-1])["iteration"] + 1 if lines and lines[-1].endswith("}") else 0


def watch(config, *flags):
    """Run the training; samples of each of its processes that live from early on to the end."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
           "OMP_NUM_THREADS": "1"}  # fmt: skip
    words = [*flags, "--config-file", config, *OPTIONS]
    samples = {}
    with open(config.parent / "log.txt", "w") as log:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train_net.py"), *map(str, words)],
            cwd=config.parent, env=env, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        while process.poll() is None:
            iteration = last_iteration(config.parent / "out/metrics.json")
            for pid in session_of(process.pid):
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    samples.setdefault(pid, []).append(take(pid, iteration))
            time.sleep(0.1)
    assert process.returncode == 0, (config.parent / "log.txt").read_text()[-3000:]
    return {
        pid: taken
        for pid, taken in samples.items()
        if taken[0].iteration <= 200 and taken[-1].iteration > STEPS - 100
    }


def middle(samples, first, last, field):
    """The median between two iterations: evaluations and pictures come and go."""
    values = [getattr(s, field) for s in samples if first <= s.iteration < last]
    return statistics.median(values)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "processes"),
    [((), 3), (("--num-gpus", "2"), 6)],
    ids=["one process", "two processes"],
)
def test_memory_and_open_files_stay_as_they_are(own_config, flags, processes):
    """With 2 data workers a process, evaluations, checkpoints, pictures and averaged weights."""
    watched = watch(own_config, *flags)
    for samples in watched.values():
        shown = [
            f"{at}: {middle(samples, at, at + 100, 'resident') / 2**20:.1f} MiB, "
            f"{middle(samples, at, at + 100, 'files'):.0f} files"
            for at in (100, 200, 1000, STEPS - 100)
        ]
        print("; ".join(shown))
    assert len(watched) >= processes
    for samples in watched.values():
        early, late = (middle(samples, at, at + 200, "resident") for at in (200, STEPS - 200))
        assert late <= 1.02 * early
        early, late = (middle(samples, at, at + 200, "files") for at in (200, STEPS - 200))
        assert late <= early

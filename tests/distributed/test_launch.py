"""Processes started as users do, by flags and by torchrun, and how such runs end."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.distributed import distributed_c10d

from iou_balanced_d2.arguments import launch_argument_parser
from iou_balanced_d2.engine.agreement import CommonError
from iou_balanced_d2.engine.launch import Placement, _join, find_placement, launch
from iou_balanced_d2.errors import UserError

from ..command import ROOT

# (The package has a function of this name.)
engine_launch = importlib.import_module("iou_balanced_d2.engine.launch")
TRAIN_NET = str(ROOT / "train_net.py")


def place(monkeypatch, *words, **environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return find_placement(launch_argument_parser().parse_args(words))


TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
            "MASTER_ADDR": "host-a", "MASTER_PORT": "29500"}  # fmt: skip
URL = ["--dist-url", "tcp://host-a:29500"]


def test_flags_and_torchrun_place_processes(monkeypatch):
    assert place(monkeypatch) == Placement(1, 1, 0, started=False)
    words = ["--num-gpus", "4", "--num-machines", "2", "--machine-rank", "1", *URL]
    assert place(monkeypatch, *words) == Placement(4, 2, 1, started=False)
    assert place(monkeypatch, **TORCHRUN) == Placement(4, 2, 1, started=True)
    assert place(monkeypatch, "--num-gpus", "4") == Placement(4, 2, 1, started=True)


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (["--num-machines", "2"], {}, "--num-machines 2 needs --dist-url"),
        (["--machine-rank", "1"], {}, "--machine-rank 1 must be in 0..0"),
        (["--dist-url", "file:///x"], {}, "must be tcp://HOST:PORT"),
        (["--dist-url", "tcp://host"], {}, "must be tcp://HOST:PORT"),
        (["--dist-url", "tcp://host:x"], {}, "must be tcp://HOST:PORT"),
        (["--dist-timeout", "0"], {}, "--dist-timeout 0 must be more than 0"),
        (["--num-gpus", "8"], TORCHRUN, "torchrun has started 2 x 4 processes: leave out"),
        (["--num-machines", "3"], TORCHRUN, "torchrun has started 2 x 4 processes: leave out"),
        ([], {"SLURM_STEP_NUM_TASKS": "8"}, "srun has started this command 8 times"),
    ],
)
def test_flags_that_do_not_fit_are_refused(monkeypatch, words, environment, said):
    with pytest.raises(UserError) as caught:
        place(monkeypatch, *words, **environment)
    assert said in str(caught.value)


def test_every_group_has_the_time_out_and_detectron2_its_own_group(monkeypatch):
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(distributed_c10d, name, getattr(distributed_c10d, name))
    monkeypatch.setattr(comm, "_LOCAL_PROCESS_GROUP", None)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**alone, "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    _join(1, "cpu", timedelta(seconds=77))
    try:
        assert (comm.get_local_rank(), comm.get_local_size()) == (0, 1)
        for group in (dist.group.WORLD, comm._LOCAL_PROCESS_GROUP, dist.new_group(backend="gloo")):
            backend = group._get_backend(torch.device("cpu"))
            assert backend.options._timeout == timedelta(seconds=77)
    finally:
        dist.destroy_process_group()


def test_machines_that_do_not_meet_end_after_the_time_out(monkeypatch):
    words = ["--num-machines", "2", "--dist-timeout", "1"]
    for rank, said in (("0", "1/2 clients joined"), ("1", "while trying to connect")):
        url = f"tcp://127.0.0.1:{free_port()}"
        given = [*words, "--machine-rank", rank, "--dist-url", url]
        args = launch_argument_parser().parse_args(given)
        with pytest.raises(UserError) as caught:
            launch(behave, args, find_placement(args), device="cpu", facts={})
        assert f"no meeting at --dist-url {url}: " in str(caught.value)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)


def test_of_each_machine_one_process_prints_an_error_of_all(monkeypatch):
    """The launcher or torchrun ends the others in the time that they wait."""

    def disagree(facts):
        raise CommonError("rank 1 disagrees")

    waits = []
    monkeypatch.setattr(engine_launch, "_join", lambda *_: None)
    monkeypatch.setattr(engine_launch, "check_same", disagree)
    monkeypatch.setattr(time, "sleep", waits.append)
    args = launch_argument_parser().parse_args([])
    for rank, expected in ((0, 0), (1, 1)):
        monkeypatch.setattr(comm, "get_local_rank", lambda rank=rank: rank)
        with pytest.raises(UserError, match="rank 1 disagrees"):
            launch(print, args, Placement(2, 1, 0, started=True), device="cpu", facts={})
        assert len(waits) == expected


@pytest.fixture
def start(tmp_path):
    """Start train_net.py in a process group of its own, as a terminal does."""
    started = []

    def begin(*words, before=(), **environment):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **environment}
        command = [sys.executable, *before, TRAIN_NET, *map(str, words)]
        with open(tmp_path / "printed", "ab") as out:
            process = subprocess.Popen(
                command, cwd=tmp_path, env=env, stdout=out, stderr=out, start_new_session=True
            )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(120)


def behave(how, folder, args):
    """One of two processes: rank 1 fails as asked for, rank 0 waits for it."""
    rank = comm.get_rank()
    (Path(folder) / f"{rank}.json").write_text(
        json.dumps([torch.get_num_threads(), comm.get_world_size(), comm.get_local_size()])
    )
    if rank == 1:
        time.sleep(0.5)
        if how == "error":
            raise ValueError("of rank 1")
        if how == "exit":  # as after results other than those expected
            raise SystemExit(1)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    comm.synchronize()


@pytest.mark.parametrize("how", ["error", "exit", "killed"])
def test_the_process_that_failed_first_is_reported(tmp_path, capfd, monkeypatch, how):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    args = launch_argument_parser().parse_args(["--num-gpus", "2", "--dist-timeout", "120"])
    main = partial(behave, how, str(tmp_path))
    assert launch(main, args, find_placement(args), device="cpu", facts={}) == 1
    err = capfd.readouterr().err
    if how == "error":
        assert err.count("Traceback") == 1
        assert err.endswith("ValueError: of rank 1\n")
    elif how == "killed":
        assert "error: process 1 of 2 was killed by SIGKILL (the kernel does that when" in err
        assert "--resume goes on" in err
        assert len(err.splitlines()) == 1
    else:
        assert err == ""
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert json.loads((tmp_path / "1.json").read_text()) == [threads, 2, 2]


def wait_for(what, process, seconds=240):
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "nothing happened"
        assert process.poll() is None, "the run has ended"
        time.sleep(0.1)
    return found


def workers_of(pid):
    """The training processes among all that a process has started."""
    children = []
    for task in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((task / "stat").read_text().rpartition(")")[2].split()[1])
            command = (task / "cmdline").read_text()
        except OSError:
            continue
        if parent == pid and ("spawn_main" in command or "train_net.py" in command):
            children.append(int(task.name))
    return sorted(children)


def running(pid):
    """Whether a process runs (a dead one that none has asked after does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def printed(folder):
    return (folder / "printed").read_text()


LONG = ["SOLVER.MAX_ITER", "100000", "SOLVER.CHECKPOINT_PERIOD", "3", "SOLVER.STEPS", "(99999,)"]


def test_two_processes_stop_on_ctrl_c_resume_and_do_not_outlive_the_launcher(
    tmp_path, own_config, start
):
    words = ["--num-gpus", "2", "--resume", "--config-file", own_config, *LONG]
    process = start(*words)
    wait_for((tmp_path / "out/last_checkpoint").exists, process)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    assert process.wait(120) == 130, printed(tmp_path)
    assert "stopped by SIGINT" in printed(tmp_path)
    assert "on cpu in 2 processes" in printed(tmp_path)
    assert "Traceback" not in printed(tmp_path)
    assert "destroy_process_group" not in printed(tmp_path)
    tag = tmp_path / "out/last_checkpoint"
    saved = tag.read_text()

    process = start(*words, "SOLVER.CHECKPOINT_PERIOD", "100000")
    wait_for(lambda: printed(tmp_path).count("First iteration done") == 2, process)
    workers = workers_of(process.pid)
    assert len(workers) == 2
    assert tag.read_text() == saved
    process.kill()
    process.wait()
    until = time.monotonic() + 60
    while any(map(running, workers)):
        assert time.monotonic() < until, "processes outlive what has started them"
        time.sleep(0.1)
    assert f"Loading from out/{saved}" in printed(tmp_path)
    assert tag.read_text() > saved, printed(tmp_path)
    assert (tmp_path / "out" / tag.read_text()).exists()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_torchrun_restarts_and_goes_on_from_the_last_checkpoint(tmp_path, own_config, start):
    """Two agents, as on two hosts: only that of the process that has died counts a restart."""
    out = tmp_path / "out"
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    torchrun += ["--rdzv-id", "x", "--max-restarts", "1"]
    # Else a process may read the addresses of those before the restart, see docs/distributed.md.
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    words = ["--config-file", own_config, *LONG]
    agents = [start(*words, before=torchrun, **environment) for _ in range(2)]
    wait_for((out / "last_checkpoint").exists, agents[0])
    for path in out.glob("model_*.pth"):  # which is the last must not follow from the clock
        os.utime(path, (1e9, 1e9))
    os.kill(workers_of(agents[1].pid)[0], signal.SIGKILL)
    wait_for(lambda: "Loading from out/model_" in printed(tmp_path), agents[0])
    resumed = printed(tmp_path).split("Loading from out/")[1].split(" ")[0]
    wait_for(lambda: max(p.name for p in out.glob("model_0*.pth")) > resumed, agents[0])


def test_a_restart_by_torchrun_is_known_without_a_group(monkeypatch):
    place = Placement(1, 1, 0, started=True)
    for count, restarted in (("0", False), ("2", True)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        args = launch_argument_parser().parse_args([])
        found = []
        main = lambda args, found=found: found.append(args.restarted)  # noqa: E731
        assert engine_launch.launch(main, args, place, device="cpu", facts={}) == 0
        assert found == [restarted]


@pytest.mark.slow
def test_torchrun_restarts_one_process_alone(tmp_path, own_config, start):
    out = tmp_path / "out"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    torchrun += ["--max-restarts", "1"]
    agent = start("--overwrite", "--config-file", own_config, *LONG, before=torchrun)
    wait_for((out / "last_checkpoint").exists, agent)
    os.kill(workers_of(agent.pid)[0], signal.SIGKILL)
    wait_for(lambda: "Loading from out/model_" in printed(tmp_path), agent)


def test_sigterm_ends_processes_that_are_only_being_started(tmp_path, own_config, start):
    process = start("--num-gpus", "2", "--config-file", own_config, *LONG)
    workers = wait_for(lambda: len(w := workers_of(process.pid)) == 2 and w, process)
    for worker in workers:  # sooner, the launcher ends before it has written what they are to do
        wait_for(lambda w=worker: "libtorch" in Path(f"/proc/{w}/maps").read_text(), process)
    process.terminate()
    assert process.wait(120) == 128 + signal.SIGTERM
    assert printed(tmp_path) == ""
    assert not any(map(running, workers))
    assert not (tmp_path / "out/last_checkpoint").exists()

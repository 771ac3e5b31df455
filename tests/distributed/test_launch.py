"""Starting processes as users do: by flags, by torchrun, by SLURM; and how such runs end."""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.distributed import HashStore, distributed_c10d

from iou_balanced_d2.engine.arguments import launch_argument_parser
from iou_balanced_d2.engine.launch import _join, launch, telling_others
from iou_balanced_d2.engine.main import has_checkpoint_since, start_of_process
from iou_balanced_d2.engine.placement import Placement, find_placement, first_host
from iou_balanced_d2.engine.rendezvous import choose_interface, find_store, interface_of, open_store
from iou_balanced_d2.engine.signals import ONE_SIGNAL
from iou_balanced_d2.errors import UserError

from ..command import ROOT

TWO = Placement(world_size=2, local_size=2, timeout=120)
TRAIN_NET = str(ROOT / "train_net.py")
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
            "MASTER_ADDR": "host-a", "MASTER_PORT": "29500"}  # fmt: skip


def place(*words, **environment):
    return find_placement(launch_argument_parser().parse_args(words), environment)


def refusal(function, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_flags_place_processes():
    assert place() == Placement()
    two = place("--num-gpus", "2", "--dist-timeout", "9")
    assert (two.world_size, two.host, two.port, two.timeout) == (2, "127.0.0.1", 0, 9)
    words = ["--num-gpus", "4", "--num-machines", "2", "--dist-url", "tcp://host-a:29500"]
    last = place(*words, "--machine-rank", "1")
    assert (last.world_size, last.num_machines, last.rank(3), last.opens_store) == (8, 2, 7, False)
    assert (last.host, last.port, last.local_rank) == ("host-a", 29500, None)
    assert place(*words).opens_store


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num-machines", "2"], "--num-machines 2 needs --dist-url"),
        (["--machine-rank", "1"], "--machine-rank 1 must be in 0..0"),
        (["--dist-url", "file:///x"], "must be tcp://HOST:PORT"),
        (["--dist-url", "tcp://host"], "must be tcp://HOST:PORT"),
        (["--dist-timeout", "0"], "--dist-timeout 0 must be more than 0"),
    ],
)
def test_flags_that_do_not_fit_are_refused(words, said):
    assert said in refusal(place, *words)


def test_torchrun_places_this_process():
    got = place(**TORCHRUN, TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RUN_ID="x")
    assert (got.local_rank, got.rank(1), got.machine_rank, got.restarts) == (1, 5, 1, True)
    assert not place(**TORCHRUN).restarts, "the variables that other starters set, too"
    assert (got.host, got.port, got.opens_store) == ("host-a", 29500, False)
    assert place(**{**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0"}).opens_store, "no agent's store"
    assert place("--num-gpus", "4", **TORCHRUN).local_size == 4
    assert "torchrun has started 4: leave --num-gpus out" in refusal(
        place, "--num-gpus", "8", **TORCHRUN
    )
    assert "--num-machines 3" in refusal(place, "--num-machines", "3", **TORCHRUN)
    assert "equally many" in refusal(place, **{**TORCHRUN, "LOCAL_WORLD_SIZE": "3"})
    assert "RANK 'x' is no number" in refusal(place, **{**TORCHRUN, "RANK": "x"})


SLURM = {"SLURM_PROCID": "6", "SLURM_LOCALID": "2", "SLURM_STEP_NUM_TASKS": "8",
         "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_STEP_NODELIST": "node[03-05,9],gpu7",
         "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0"}  # fmt: skip


def test_srun_places_this_process():
    got = place(**SLURM)
    assert (got.world_size, got.local_size, got.local_rank, got.rank(2)) == (8, 4, 2, 6)
    assert (got.host, got.opens_store) == ("node03", False)
    assert 20000 <= got.port < 30000
    assert got.port == place(**{**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).port
    got = place(**SLURM, MASTER_ADDR="host-a", MASTER_PORT="4000")
    assert (got.host, got.port) == ("host-a", 4000)
    assert "equally many" in refusal(place, **{**SLURM, "SLURM_STEP_TASKS_PER_NODE": "5,3"})
    assert "in order" in refusal(place, **{**SLURM, "SLURM_LOCALID": "3"}), "cyclic"
    script = {key: value for key, value in SLURM.items() if "STEP" not in key}
    assert place(**script, SLURM_NTASKS="8").world_size == 1, "sbatch's script without srun"
    # One task that starts the processes itself.
    assert place("--num-gpus", "8", **{**SLURM, "SLURM_STEP_NUM_TASKS": "1"}).local_rank is None
    assert place("--num-gpus", "8", **SLURM).local_rank is None


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("node[03-05,9],gpu7", "node03"), ("gpu7,node[1-2]", "gpu7"), ("a", "a"), ("n[7]", "n7"),
     ("r[1-2]n[08-9]x", "r1n08x"), ("n-1.b[10,12-14]", "n-1.b10")],
)  # fmt: skip
def test_first_host_of_slurms_list(nodes, host):
    assert first_host(nodes) == host


def test_no_host_in_slurms_list_is_explained():
    assert "set MASTER_ADDR" in refusal(first_host, "")
    assert "set MASTER_ADDR" in refusal(first_host, "node[x")


def test_two_stores_of_one_machine_take_different_ports_and_a_taken_one_is_named():
    first, second = open_store(TWO), open_store(TWO)
    assert first.port != second.port
    message = refusal(open_store, Placement(port=first.port))
    assert f"port {first.port} of 127.0.0.1" in message
    assert "in use" in message


def test_the_store_of_several_machines_is_reached_by_ipv4_and_ipv6():
    """A host's name may mean one address on itself, and another one elsewhere."""
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    two = Placement(world_size=2, host="127.0.0.1")
    server = open_store(two)
    server.set("x", "1")
    for host in ("127.0.0.1", "::1"):
        assert find_store(replace(two, host=host, port=server.port, timeout=2)).get("x") == b"1"


def test_gloo_gets_the_interface_that_leads_to_the_others(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert interface_of("127.0.1.1") == "lo"
    assert interface_of("192.0.2.77") == ""
    choose_interface(Placement(port=1234))
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    choose_interface(Placement(port=1234))
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


@pytest.mark.parametrize("old", [False, True])
def test_every_group_has_the_time_out_and_detectron2_its_own_group(monkeypatch, old):
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(distributed_c10d, name, getattr(distributed_c10d, name))
    monkeypatch.setattr(comm, "_LOCAL_PROCESS_GROUP", None)
    comm.create_local_process_group.cache_clear()
    if old:  # detectron2 0.6
        monkeypatch.delattr(comm, "create_local_process_group")
    _join(HashStore(), Placement(timeout=77), 0, "gloo")
    try:
        assert (comm.get_local_rank(), comm.get_local_size()) == (0, 1)
        for group in (dist.group.WORLD, comm._LOCAL_PROCESS_GROUP, dist.new_group(backend="gloo")):
            backend = group._get_backend(torch.device("cpu"))
            assert backend.options._timeout == timedelta(seconds=77)
    finally:
        dist.destroy_process_group()


def test_only_a_checkpoint_of_this_run_is_resumed_from_after_a_restart(tmp_path):
    start = start_of_process(os.getpid())
    assert time.time() - 3600 < start <= time.time()
    assert not has_checkpoint_since(str(tmp_path), start)
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    assert not has_checkpoint_since(str(tmp_path), start), "named, but gone"
    (tmp_path / "model_0000003.pth").write_text("")
    assert has_checkpoint_since(str(tmp_path), start)
    os.utime(tmp_path / "model_0000003.pth", (start - 5, start - 5))
    assert not has_checkpoint_since(str(tmp_path), start)


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


def behave(how, folder):
    """What one of two processes does: rank 1 what is asked for, rank 0 waits for it."""
    rank = comm.get_rank()
    (Path(folder) / f"{rank}.json").write_text(
        json.dumps([torch.get_num_threads(), comm.get_world_size(), comm.get_local_size()])
    )
    if how == "stopped":  # as by a signal: rank 0 still saves when rank 1 is gone
        time.sleep(2 if rank == 0 else 0)
        (Path(folder) / f"saved_{rank}").write_text("")
        raise SystemExit(143)
    if how == "deaf":
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN)
        (Path(folder) / f"deaf_{rank}").write_text(str(os.getpid()))
        time.sleep(60)
    if rank == 1:
        time.sleep(0.5)
        if how == "error":
            raise ValueError("of rank 1")
        if how == "exit":  # as by results that are not those expected
            raise SystemExit(1)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    comm.synchronize()


@pytest.mark.parametrize("how", ["error", "exit", "killed", "stopped"])
def test_the_story_of_the_process_that_failed_first_is_told(tmp_path, capfd, monkeypatch, how):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    begin = lambda: launch(behave, (how, str(tmp_path)), TWO, device="cpu", facts={})  # noqa: E731
    assert begin() == (143 if how == "stopped" else 1)
    err = capfd.readouterr().err
    if how == "error":
        assert err.count("Traceback") == 1
        assert err.endswith("ValueError: of rank 1\n")
    elif how == "killed":
        assert "error: process 1 of 2 was killed by SIGKILL (the kernel does that when" in err
        assert "--resume goes on" in err
        assert "Traceback" not in err
    else:
        assert (tmp_path / "saved_0").exists() == (how == "stopped")
        assert "Traceback" not in err
        assert "lost the connection" not in err
    assert "destroy_process_group" not in err
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert json.loads((tmp_path / "1.json").read_text()) == [threads, 2, 2]


def test_a_later_signal_of_the_same_kind_kills_all(tmp_path):
    """One within the first second is the same, told twice."""
    pids = []

    def send():
        while len(deaf := list(tmp_path.glob("deaf_*"))) < 2 or not all(
            x.read_text() for x in deaf
        ):
            time.sleep(0.1)
        pids.extend(int(x.read_text()) for x in deaf)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        alive.extend(running(pid) for pid in pids)
        time.sleep(2 * ONE_SIGNAL)
        os.kill(os.getpid(), signal.SIGTERM)

    alive = []
    sender = threading.Thread(target=send, daemon=True)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # one too late must not end the tests
    try:
        sender.start()
        assert launch(behave, ("deaf", str(tmp_path)), TWO, device="cpu", facts={}) == 143
        sender.join(10)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert alive == [True, True]
    assert not any(map(running, pids))


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
    assert "World size: 2" in printed(tmp_path)
    assert "Traceback" not in printed(tmp_path)
    assert "destroy_process_group" not in printed(tmp_path)
    tag = tmp_path / "out/last_checkpoint"
    saved = tag.read_text()

    process = start(*words)
    wait_for(lambda: tag.read_text() != saved, process)
    workers = workers_of(process.pid)
    assert len(workers) == 2
    process.kill()
    process.wait()
    until = time.monotonic() + 60
    while any(map(running, workers)):
        assert time.monotonic() < until, "processes outlive what has started them"
        time.sleep(0.1)
    assert f"Loading from out/{saved}" in printed(tmp_path)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_torchrun_restarts_and_goes_on_from_this_runs_checkpoint(tmp_path, own_config, start):
    """Two agents, as on two hosts: only that of the process that has died counts a restart."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "model_0009999.pth").write_text("of an older run: broken, and not to be read")
    (out / "last_checkpoint").write_text("model_0009999.pth")
    os.utime(out / "model_0009999.pth", (1e9, 1e9))
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    torchrun += ["--rdzv-id", "x", "--max-restarts", "1"]
    agents = [start("--config-file", own_config, *LONG, before=torchrun) for _ in range(2)]
    tag = out / "last_checkpoint"
    wait_for(lambda: tag.read_text() != "model_0009999.pth", agents[0])
    os.kill(workers_of(agents[1].pid)[0], signal.SIGKILL)
    wait_for(lambda: "Loading from out/model_" in printed(tmp_path), agents[0])
    resumed = printed(tmp_path).split("Loading from out/")[1].split(" ")[0]
    assert resumed != "model_0009999.pth"
    newest = lambda: max(p.name for p in out.glob("model_000[0-8]*.pth"))  # noqa: E731
    wait_for(lambda: newest() > resumed, agents[0])


def test_tasks_of_srun_that_disagree_end_in_one_line(tmp_path, own_config, start):
    processes = []
    for rank, rate in enumerate(("0.01", "0.02")):
        slurm = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2",
                 "SLURM_TASKS_PER_NODE": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0",
                 "SLURM_JOB_NODELIST": "node[1-2]", "MASTER_PORT": str(free_port())}  # fmt: skip
        slurm["MASTER_PORT"] = processes[0][1] if processes else slurm["MASTER_PORT"]
        words = ["--config-file", own_config, "SOLVER.BASE_LR", rate]
        processes.append((start(*words, **slurm), slurm["MASTER_PORT"]))
    assert [process.wait(240) for process, _ in processes] == [2, 2]
    lines = [line for line in printed(tmp_path).splitlines() if "error:" in line]
    assert len(lines) == 1
    assert lines[0].startswith("train_net.py: error: rank 1 on ")
    assert lines[0].endswith("SOLVER.BASE_LR is 0.02 there, 0.01 here")


def machine(rank, port, timeout, **kwargs):
    """One of two machines with a process each, which is the test's own."""
    return Placement(
        world_size=2, machine_rank=rank, local_rank=0, port=port, timeout=timeout,
        opens_store=rank == 0, **kwargs,
    )  # fmt: skip


def test_machines_that_do_not_come_are_named(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    begin = lambda rank: launch(  # noqa: E731
        behave, (), machine(rank, port, 0.5), device="cpu", facts={}
    )
    port = free_port()
    assert "waited 0.5 s for rank 1 of 2 (--machine-rank 1): " in refusal(begin, 0)
    port = free_port()
    message = refusal(begin, 1)
    assert "waited 0.5 s for rank 0 of 2 (--machine-rank 0) at tcp://127.0.0.1:" in message
    assert "Connection refused" in message


def test_the_first_machine_that_can_not_start_tells_the_others(monkeypatch):
    """And holds the store for them, though not for long."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kept = []
    monkeypatch.setattr(atexit, "register", lambda *args: kept.append(args))
    first, second = (replace(machine(rank, free_port(), 20), host="127.0.0.1") for rank in (0, 1))
    second = replace(second, port=first.port)

    def fail():
        with telling_others(first):
            raise UserError("no such file")

    assert refusal(fail) == "no such file"
    message = refusal(launch, behave, (), second, device="cpu", facts={})
    assert message.startswith("rank 0 on ")
    assert message.endswith(" can't start: no such file")
    ((linger, *args),) = kept
    start = time.monotonic()
    linger(*args)
    assert time.monotonic() - start < 5, "all have read it"


def test_a_process_of_torchrun_that_can_not_start_ends_all_at_once(tmp_path, own_config, start):
    """Far before the time-out, which is of 10 minutes."""
    torchrun = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "x"}  # fmt: skip
    processes = []
    for rank in ("0", "1"):
        missing = ["DATASETS.COCO_JSON", "(('own', 'gone.json', 'images'),)"] if rank == "1" else []
        own = {"RANK": rank, "LOCAL_RANK": rank, **torchrun}
        processes.append(start("--config-file", own_config, *missing, **own))
    assert [process.wait(120) for process in processes] == [2, 2]
    lines = sorted(line for line in printed(tmp_path).splitlines() if "error:" in line)
    assert len(lines) == 2
    assert "gone.json" in lines[0]
    assert lines[1].startswith("train_net.py: error: rank 1 on ")
    assert "can't start: " in lines[1]
    assert "gone.json" in lines[1]


def test_sigterm_ends_processes_that_are_only_being_started(tmp_path, own_config, start):
    process = start("--num-gpus", "2", "--config-file", own_config, *LONG)
    workers = wait_for(lambda: len(w := workers_of(process.pid)) == 2 and w, process)
    process.terminate()
    assert process.wait(120) == 128 + signal.SIGTERM
    assert printed(tmp_path) == ""
    assert not any(map(running, workers))
    assert not (tmp_path / "out/last_checkpoint").exists()

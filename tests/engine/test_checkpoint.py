"""Checkpoints: whole or not there, the way back, no code in them, one reader for all processes."""

import collections
import http.server
import io
import os
import pickle
import resource
import shutil
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm
from torch import nn

from iou_balanced_d2.arguments import parse
from iou_balanced_d2.engine.checkpoint import RobustCheckpointer, checkpoint_files
from iou_balanced_d2.engine.checks import check_training
from iou_balanced_d2.engine.main import evaluate, main
from iou_balanced_d2.engine.safe_load import BrokenCheckpoint, read_checkpoint
from iou_balanced_d2.engine.trainer import Trainer
from iou_balanced_d2.errors import UserError
from iou_balanced_d2.files import remove_unfinished, write_atomically
from iou_balanced_d2.model_zoo import get_config_file

from ..toy import CONFIG, toy_config, toy_model

R50 = Path(__file__).parents[3] / "shared/weights/R-50.pkl"


class State:
    """A checkpointable of one number."""

    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def checkpointer_of(folder, value=0.0):
    model = nn.Linear(40, 40)
    nn.init.constant_(model.weight, value)
    return RobustCheckpointer(model, str(folder), state=State(value))


def saved(folder, *iterations):
    """Checkpoints of these iterations, whose weights are the iteration."""
    for i in iterations:
        checkpointer_of(folder, float(i)).save(f"model_{i:07d}", iteration=i)


def value_of(checkpointer):
    """The one value of the weights, and that of the state beside them."""
    assert checkpointer.model.weight.unique().numel() == 1
    return checkpointer.model.weight[0, 0].item(), checkpointer.checkpointables["state"].value


def truncate(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def test_resumes_from_the_newest(tmp_path):
    saved(tmp_path, 3, 7)
    checkpointer = checkpointer_of(tmp_path)
    assert checkpointer.resume_or_load("", resume=True) == {"iteration": 7}
    assert checkpointer.resumed
    assert value_of(checkpointer) == (7.0, 7.0)
    assert sorted(os.listdir(tmp_path)) == [
        "last_checkpoint", "model_0000003.pth", "model_0000007.pth",
    ]  # fmt: skip


def test_weights_alone_are_loaded_without_the_rest(tmp_path):
    saved(tmp_path, 3)
    checkpointer = checkpointer_of(tmp_path / "other")
    checkpointer.resume_or_load(str(tmp_path / "model_0000003.pth"), resume=True)
    assert not checkpointer.resumed
    assert value_of(checkpointer) == (3.0, 0.0)
    assert checkpointer.resume_or_load("", resume=True) == {}


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
def test_a_truncated_newest_falls_back_to_the_one_before(tmp_path, caplog, share):
    saved(tmp_path, 3, 7, 9)
    truncate(tmp_path / "model_0000009.pth", share)
    checkpointer = checkpointer_of(tmp_path)
    checkpointer.resume_or_load("", resume=True)
    assert value_of(checkpointer) == (7.0, 7.0)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "model_0000009.pth' can't be read: " in warnings[0]
    assert "trying the one before, " in warnings[0]
    assert "model_0000007.pth" in warnings[0]


def test_without_any_that_can_be_read_it_is_an_error(tmp_path):
    saved(tmp_path, 3, 7)
    for path in tmp_path.glob("*.pth"):
        truncate(path, 0.5)
    with pytest.raises(UserError, match=r"model_0000003.pth' can't be read: .*--overwrite starts"):
        checkpointer_of(tmp_path).resume_or_load("", resume=True)


def test_files_to_resume_from(tmp_path):
    def names():
        return [Path(path).name for path in checkpoint_files(str(tmp_path))]

    assert names() == []
    assert checkpoint_files(str(tmp_path / "gone")) == []
    for name in ("0000003", "0000007", "0000011", "best", "final", "ema"):
        (tmp_path / f"model_{name}.pth").touch()
    # Killed before the first last_checkpoint; then with an older, longer training's files.
    assert names() == ["model_0000011.pth", "model_0000007.pth", "model_0000003.pth"]
    (tmp_path / "last_checkpoint").write_text("model_0000007.pth")
    assert names() == ["model_0000007.pth", "model_0000003.pth"]
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    assert names()[:2] == ["model_final.pth", "model_0000011.pth"]


def test_a_kill_while_writing_leaves_what_was_there(tmp_path):
    saved(tmp_path, 3)
    before = (tmp_path / "model_0000003.pth").read_bytes()

    def write(f):
        f.write(b"half")
        f.flush()
        os._exit(9)

    if (child := os.fork()) == 0:
        write_atomically(str(tmp_path / "model_0000003.pth"), write)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    (left,) = tmp_path.glob(".*.unfinished")
    assert left.read_bytes() == b"half"
    assert (tmp_path / "model_0000003.pth").read_bytes() == before
    assert checkpoint_files(str(tmp_path)) == [str(tmp_path / "model_0000003.pth")]
    remove_unfinished(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000003.pth"]


def test_a_full_disk_is_one_line_and_the_one_before_stays(tmp_path):
    saved(tmp_path, 3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (5000, hard)
    )  # a write beyond fails, as on full disks
    try:
        with pytest.raises(UserError) as caught:
            saved(tmp_path, 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(caught.value)
    assert message.startswith(f"{str(tmp_path / 'model_0000005.pth')!r} can't be written: ")
    assert "File too large" in message
    assert "\n" not in message
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000003.pth"]
    checkpointer = checkpointer_of(tmp_path)
    checkpointer.resume_or_load("", resume=True)
    assert value_of(checkpointer) == (3.0, 3.0)


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_malicious(folder, suffix):
    file = folder / f"weights{suffix}"
    content = {"model": {"weight": np.zeros(2)}, "__author__": Malicious(folder / "made")}
    if suffix == ".pkl":
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file)
    return file


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".pyth"])
def test_code_in_a_checkpoint_is_refused(tmp_path, suffix):
    file = write_malicious(tmp_path, suffix)
    with pytest.raises(UserError) as caught:
        RobustCheckpointer(nn.Linear(1, 1)).load(str(file))
    assert not isinstance(caught.value, BrokenCheckpoint), "resume must not pass over it"
    assert not (tmp_path / "made").exists()
    assert "\n" not in str(caught.value)
    assert f"{str(file)!r} holds " in str(caught.value)
    assert "--trust-checkpoint" in str(caught.value)


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_trusted_files_are_read_whole(tmp_path, suffix):
    read_checkpoint(str(write_malicious(tmp_path, suffix)), trust=True)
    assert (tmp_path / "made").exists()


@pytest.mark.parametrize("flags", [[], ["--eval-only"]])
def test_files_are_trusted_by_the_flag_alone(tmp_path, monkeypatch, flags):
    cfg = toy_config(
        "MODEL.WEIGHTS", str(write_malicious(tmp_path, ".pkl")),
        "OUTPUT_DIR", str(tmp_path / "out"), "SEED", 1,
    )  # fmt: skip
    monkeypatch.setattr(Trainer, "build_model", staticmethod(lambda cfg: nn.PReLU(2)))
    monkeypatch.setattr(Trainer, "build_train_loader", lambda trainer, cfg: [[{}]])
    monkeypatch.setattr(Trainer, "train", lambda trainer: {})
    monkeypatch.setattr(Trainer, "test", lambda cfg, model: {})
    flags = [*flags, "--config-file", get_config_file(CONFIG)]
    with pytest.raises(UserError, match="--trust-checkpoint"):
        main(cfg, parse("train", flags))
    assert not (tmp_path / "made").exists()
    main(cfg, parse("train", ["--trust-checkpoint", *flags]))
    assert (tmp_path / "made").exists()


class Call:
    """Pickles as a call, with a state to set on what it gives."""

    def __init__(self, function, arguments, *state):
        self.call = (function, arguments, *state)

    def __reduce__(self):
        return self.call


OBJECT = np.dtype("O")
# A field of objects whose flags say that there is none: numpy takes the bytes for addresses.
HIDDEN = Call(np.dtype, ("V8",), (3, "|", None, ("a",), {"a": (OBJECT, 0)}, 8, 1, 0))
LATER = Call(np.dtype, ("f8",), (3, "<", None, ("a",), {"a": (OBJECT, 0)}, 8, 1, 0))


@pytest.mark.parametrize(
    "array",
    [
        Call(np.ndarray, ((1,), OBJECT, b"ADDRESS.")),
        Call(np.zeros(1).__reduce__()[0], (np.ndarray, (0,), b"b"),
             (1, (1,), HIDDEN, False, b"ADDRESS.")),
        Call(np.zeros(1).__reduce__()[0], (np.ndarray, (0,), b"b"),
             (1, (1,), LATER, False, b"ADDRESS.")),
        Call(np.zeros(1).__reduce__()[0], (np.ndarray, (0,), b"b"),
             (1, (1,), OBJECT, False, [1])),
        Call(bytes, (10**12,)),
    ],
    ids=["buffer", "hidden field", "field set later", "objects", "bytes"],
)  # fmt: skip
def test_arrays_of_addresses_are_refused(tmp_path, array):
    """Reading one element of such an array would follow an address of the file's choice."""
    content = {"model": {"w": array}, "__author__": "x"}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UserError, match=r"x\.pkl"):
        read_checkpoint(str(tmp_path / "x.pkl"))


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_and_plain_containers_are_read_from_pickles(tmp_path, protocol):
    weights = {"a": np.arange(6.0).reshape(2, 3), "b": np.zeros((0, 2), np.float32),
               "c_momentum": np.ones(1)}  # fmt: skip
    content = collections.OrderedDict(blobs=weights, lr=np.float64(0.1), steps=[1, (2, None)])
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    read = read_checkpoint(str(tmp_path / "x.pkl"))
    assert read["matching_heuristics"]
    assert read["__author__"] == "Caffe2"
    assert list(read["model"]) == ["a", "b"]
    for model in (read["model"], pickle.loads(pickle.dumps(read["model"]))):  # for other ranks
        for name, array in model.items():
            np.testing.assert_array_equal(array, weights[name])
            assert array.dtype == weights[name].dtype
            torch.from_numpy(array)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", b"no weights", "can't be read"),
        ("a.pkl", b"no weights", "can't be read"),
        ("a.pkl", pickle.dumps([1]), "is not a dict of weights"),
        ("a.pkl", pickle.dumps({"model": {"w": 1}, "__author__": "x"}), "'w' is a int"),
    ],
)
def test_other_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BrokenCheckpoint, match=message) as caught:
        RobustCheckpointer(nn.Linear(1, 1)).load(str(tmp_path / name))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.skipif(not R50.exists(), reason="no shared/weights beside the repository")
def test_the_zoo_s_backbone_is_loaded(caplog):
    model = toy_model("MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 256)
    before = model.backbone.bottom_up.res5[2].conv3.weight.clone()
    RobustCheckpointer(model).resume_or_load(str(R50), resume=False)
    pytest.importorskip("numpy._core", reason="the file, written by NumPy 2, is read by pickle")
    with open(R50, "rb") as f:
        weights = pickle.load(f, encoding="latin1")["model"]
    loaded = model.backbone.bottom_up.res5[2].conv3.weight
    assert not torch.equal(loaded, before)
    np.testing.assert_array_equal(loaded.detach(), weights["res5.2.conv3.weight"])


def test_heuristics_can_be_asked_for_in_the_address(tmp_path):
    """Names are matched by their ends: here "weight" to "head.weight"."""
    torch.save({"weight": torch.full((2, 2), 5.0), "bias": torch.zeros(2)}, tmp_path / "x.pth")
    model = nn.ModuleDict({"head": nn.Linear(2, 2)})
    RobustCheckpointer(model).load(f"{tmp_path}/x.pth?matching_heuristics=True")
    assert (model["head"].weight == 5).all()


def test_values_of_the_new_keys_are_checked():
    for words, message in (
        (["SOLVER.AMP.PRECISION", "fp16"], "SOLVER.AMP.PRECISION must be one of float16, bfloat16"),
        (["SOLVER.AMP.ENABLED", True], "float16 needs a GPU: on the CPU set"),
        (["MODEL.EMA.DECAY", 1.0], r"MODEL.EMA.DECAY must be in \[0, 1\), got 1.0"),
    ):
        with pytest.raises(UserError, match=message):
            check_training(toy_config(*words))
    check_training(toy_config())


def test_evaluation_of_a_checkpoint_has_the_average_beside_it(tmp_path, monkeypatch):
    """Weights of 1 with an average of 2: both are evaluated, each with its own."""
    cfg = toy_config("MODEL.EMA.ENABLED", True, "OUTPUT_DIR", str(tmp_path))
    monkeypatch.setattr(Trainer, "build_model", lambda cfg: nn.Linear(40, 40))
    monkeypatch.setattr(
        Trainer, "test", lambda cfg, model: {"bbox": {"AP": model.weight.mean().item()}}
    )
    checkpointer = checkpointer_of(tmp_path, 1.0)
    average = {k: torch.full_like(v, 2.0) for k, v in checkpointer.model.state_dict().items()}
    checkpointer.save("model_final", ema=average)
    results = evaluate(cfg, resume=True)
    assert results == {"bbox": {"AP": 1.0}, "ema": {"bbox": {"AP": 2.0}}}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def host(rank, port, folder):
    """A process with a folder of its own; only the first one's holds checkpoints."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    checkpointer = checkpointer_of(folder / str(rank))
    rest = checkpointer.resume_or_load("", resume=True)
    results = [rest, checkpointer.resumed, value_of(checkpointer)]
    if rank == 0:
        shutil.rmtree(folder / "0")
    dist.barrier()
    try:
        checkpointer.load(str(folder / "0/model_0000005.pth"))
    except UserError as error:
        results.append(str(error))
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_hosts_without_the_files_get_the_state_of_the_first(tmp_path):
    """Also when its newest is broken; and all of them end when it has nothing to read."""
    saved_in = tmp_path / "0"
    saved_in.mkdir()
    saved(saved_in, 3, 5)
    truncate(saved_in / "model_0000005.pth", 0.5)
    mp.start_processes(host, (free_port(), tmp_path), nprocs=2, start_method="fork")
    first, second = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert first == second
    assert first[:3] == [{"iteration": 3}, True, (3.0, 3.0)]
    assert "can't be read: No such file" in first[3]


class Server(http.server.BaseHTTPRequestHandler):
    """Has one file, and speaks of nothing."""

    content = b""

    def do_GET(self):
        found = self.path == "/weights/x.pth"
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(self.content if found else b"")

    def log_message(self, *_):
        pass


@pytest.fixture
def address(tmp_path, monkeypatch):
    """Of a server on this machine, for as long as a test takes."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    buffer = io.BytesIO()
    torch.save({"model": checkpointer_of(tmp_path, 2.0).model.state_dict()}, buffer)
    monkeypatch.setattr(Server, "content", buffer.getvalue())
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_weights_are_downloaded(tmp_path, address):
    checkpointer = checkpointer_of(tmp_path)
    checkpointer.load(f"{address}/weights/x.pth?matching_heuristics=True")
    assert value_of(checkpointer) == (2.0, 0.0)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/gone.pth", "Not Found"),
        ("/weights/../../../x.pth", "'..' in it"),  # else written outside of the cache
    ],
)
def test_a_failed_download_is_one_line(tmp_path, address, path, reason):
    with pytest.raises(UserError) as caught:
        checkpointer_of(tmp_path).load(address + path)
    message = str(caught.value)
    assert message.startswith(f"{address + path!r} can't be downloaded: ")
    assert reason in message
    assert "\n" not in message


def test_a_server_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(UserError, match=r"x\.pth' can't be downloaded: .*refused"):
        checkpointer_of(tmp_path).load(f"http://127.0.0.1:{free_port()}/x.pth")

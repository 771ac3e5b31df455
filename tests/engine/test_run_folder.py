"""OUTPUT_DIR: one training at a time, nothing overwritten without a word, no way out of it."""

import argparse
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from iou_balanced_d2.arguments import parse
from iou_balanced_d2.engine import Trainer, main, run_folder
from iou_balanced_d2.engine.run_folder import check_output_dir, check_unused, one_training
from iou_balanced_d2.errors import UserError
from iou_balanced_d2.model_zoo import get_config_file

from ..command import ROOT, run
from ..toy import CONFIG, toy_config


def arguments(**changes):
    return argparse.Namespace(
        **{"resume": False, "overwrite": False, "restarted": False, **changes}
    )


def enter(folder, weights="", **changes):
    """Whether a training in the folder is resumed."""
    with one_training(str(folder), arguments(**changes), weights) as resume:
        return resume


def start(config, *options):
    """Start train_net.py."""
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", config, *options]
    return subprocess.Popen(
        [*map(str, command)], cwd=config.parent, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def seeds(folder):
    """The seeds of the trainings that have written the checkpoints, each of which is whole."""
    files = list(folder.glob("*.pth"))
    contents = [torch.load(file, weights_only=True) for file in files]
    assert len(files) >= 5
    return {content["run"]["SEED"] for content in contents}


def test_of_two_trainings_at_a_time_one_writes_and_the_next_overwrites_only_when_asked(own_config):
    out = own_config.parent / "out"
    words = ["SOLVER.CHECKPOINT_PERIOD", 1]
    both = [start(own_config, *words, "SEED", seed) for seed in (1, 2)]
    ends = [(*process.communicate(timeout=300), process.returncode) for process in both]
    assert sorted(code for _, _, code in ends) == [0, 2], ends
    ((_, err, _),) = [end for end in ends if end[2] == 2]
    assert "error: OUTPUT_DIR 'out'" in err
    assert "writes there: wait for its end" in err or "holds a training" in err
    (winner,) = [str(seed) for seed, end in zip((1, 2), ends, strict=True) if end[2] == 0]
    assert seeds(out) == {winner}
    before = {path: path.read_bytes() for path in out.glob("*.*")}

    code, _, err = run("--config-file", own_config, cwd=own_config.parent)
    assert code == 2
    assert (
        "OUTPUT_DIR 'out' holds a training (last_checkpoint, metrics.json, model_0000000.pth" in err
    )
    assert "--resume goes on with it, --overwrite deletes it" in err
    assert {path: path.read_bytes() for path in out.glob("*.*")} == before

    words = ["SOLVER.CHECKPOINT_PERIOD", 1, "SEED", 3, "SOLVER.MAX_ITER", 5, "SOLVER.STEPS", "(3,)"]
    code, _, err = run("--config-file", own_config, "--overwrite", *words, cwd=own_config.parent)
    assert code == 0, err
    assert seeds(out) == {"3"}
    assert (out / "log.txt").read_text().count("Starting training from iteration 0") == 1


def held(folder):
    """A process that holds the folder, and what it says when it does."""
    code = (
        "import sys, time; from tests.engine.test_run_folder import arguments, one_training\n"
        f"with one_training({str(folder)!r}, arguments(), ''):\n"
        " print(1, flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"1\n"
    return process


def test_a_lock_ends_with_its_process(tmp_path, monkeypatch):
    process = held(tmp_path)
    monkeypatch.setattr(run_folder, "_PATIENCE", 1.0)
    for resume in (False, True):
        with pytest.raises(UserError, match=rf"another training \(process {process.pid} on "):
            enter(tmp_path, resume=resume)
    monkeypatch.setattr(run_folder, "_PATIENCE", 120.0)
    os.kill(process.pid, signal.SIGSTOP)  # so that it dies while this one waits
    if os.fork() == 0:
        time.sleep(1)
        os.kill(process.pid, signal.SIGKILL)
        os._exit(0)
    assert enter(tmp_path, resume=True)
    process.wait()


def test_an_evaluation_takes_no_lock(tmp_path, monkeypatch):
    def held_by_another(*_):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(run_folder.fcntl, "lockf", held_by_another)
    monkeypatch.setattr(Trainer, "test", lambda cfg, model: {"bbox": {"AP": 1.0}})
    with pytest.raises(UserError, match="another training"):
        enter(tmp_path)
    cfg = toy_config("OUTPUT_DIR", str(tmp_path), "SEED", 1)
    args = parse("train", ["--eval-only", "--config-file", get_config_file(CONFIG)])
    assert main(cfg, args) == {"bbox": {"AP": 1.0}}


def test_disks_without_locks_are_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "lockf", refuse)
    assert not enter(tmp_path)
    assert "can't be locked (No locks available)" in caplog.text


def test_what_counts_as_a_training(tmp_path):
    check_unused(str(tmp_path / "gone"))
    for name in ("config.yaml", "log.txt", "model_pretrained.pth", "run.yaml"):
        (tmp_path / name).write_text("x")
    (tmp_path / "metrics.json").touch()  # ended before its first line
    check_unused(str(tmp_path))
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds a training \(metrics.json\): --resume goes on"):
        check_unused(str(tmp_path))


def test_only_what_a_training_has_written_is_deleted(tmp_path):
    kept = {"model_pretrained.pth", "notes.txt", "config.yaml", "run.yaml", ".lock"}
    gone = {"model_0000003.pth", "model_final.pth", "metrics.json", "log.txt", "log.txt.rank1",
            "last_checkpoint", "model_best.json", "events.out.tfevents.1.x"}  # fmt: skip
    for name in kept | gone:
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=r"model_final.pth' is a file that --overwrite would"):
        enter(tmp_path, str(tmp_path / "model_final.pth"), overwrite=True)
    weights = str(tmp_path / "model_final.pth") + "?matching_heuristics=True"
    with pytest.raises(UserError, match=r"that --overwrite would"):
        enter(tmp_path, weights, overwrite=True)
    assert set(os.listdir(tmp_path)) == kept | gone
    assert not enter(tmp_path, str(tmp_path / "model_pretrained.pth"), overwrite=True)
    assert set(os.listdir(tmp_path)) == kept


def test_a_restart_by_torchrun_resumes_what_it_has_started_alone(tmp_path):
    """Of a refused start too there are restarts, by the same agent."""
    assert not enter(tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    assert enter(tmp_path, restarted=True)
    assert enter(tmp_path, restarted=True, overwrite=True), "not what it has itself written"
    assert (tmp_path / "last_checkpoint").exists()
    for restarted in (False, True, True):
        with pytest.raises(UserError, match="holds a training"):
            enter(tmp_path, restarted=restarted)
    assert enter(tmp_path, resume=True)


@pytest.mark.parametrize(
    "name", ["log.txt", "log.txt.rank1", "metrics.json", "config.yaml", "inference",
             "inference/own", "ema/inference/own/coco_instances_results.json"],
)  # fmt: skip
@pytest.mark.parametrize("there", [True, False])
def test_links_out_of_the_folder_are_refused(tmp_path, name, there):
    out, precious = tmp_path / "out", tmp_path / "precious"
    (out / name).parent.mkdir(parents=True)
    (out / name).symlink_to(precious)
    if there:
        precious.write_text("mine")
    with pytest.raises(UserError, match=r"is a link to elsewhere, which the run would write to"):
        check_output_dir(str(out))
    assert not there or precious.read_text() == "mine"


def test_other_links_are_fine(tmp_path):
    """A folder that is one, one inside, and weights that are not written."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/real.txt").touch()
    (tmp_path / "disk/log.txt").symlink_to("real.txt")
    (tmp_path / "disk/model_pretrained.pth").symlink_to(tmp_path / "w.pth")
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    check_output_dir(str(tmp_path / "out"))


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    Path(tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"\.lock' can't be opened"):
        enter(tmp_path)
    assert not (tmp_path / "precious").exists()

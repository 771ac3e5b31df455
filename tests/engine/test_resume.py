"""A training that was interrupted gives, bit for bit, what it gives without."""

import copy
import itertools
import json
import logging
import multiprocessing
import os
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
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import hooks
from torch import nn

from iou_balanced_d2.data.resumable_loader import ResumableLoader, SeedState, seed_step
from iou_balanced_d2.engine.optimizer import WeightsAverage
from iou_balanced_d2.engine.signals import ONE_SIGNAL, Stopped, StopSignals
from iou_balanced_d2.engine.train_step import StepTrainer, autocast
from iou_balanced_d2.engine.trainer import Trainer

from ..toy import THIN, toy_batch, toy_config, toy_model

ROOT = Path(__file__).parents[2]
NAME = "interrupted"
WORKERS = "DATALOADER.NUM_WORKERS"


def make_data(folder):
    """Five images, three of them wide and two tall, with a box each."""
    images, annotations = [], []
    for i in range(5):
        width, height = ((64, 48), (48, 64))[i % 2]
        image = np.full((height, width, 3), 40, np.uint8)
        image[8:38, 6 + i : 36 + i] = 220
        cv2.imwrite(str(folder / f"{i}.png"), image)
        images.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        annotations.append({"id": i + 1, "image_id": i, "category_id": 1, "area": 900,
                            "bbox": [6 + i, 8, 30, 30], "iscrowd": 0})  # fmt: skip
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "square"}],
    }
    (folder / "data.json").write_text(json.dumps(content))


def config_of(folder, output, *words):
    """A training of 12 steps with all that has a state: dropout, flips, sizes, average, w_loc."""
    return toy_config(
        *THIN, "MODEL.RETINANET.NUM_CLASSES", 1,
        "DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (NAME,),
        "INPUT.MIN_SIZE_TRAIN", (40, 48, 56), "INPUT.MIN_SIZE_TEST", 48, WORKERS, 0,
        "SOLVER.IMS_PER_BATCH", 2, "SOLVER.REFERENCE_WORLD_SIZE", 0, "SOLVER.MAX_ITER", 12,
        "SOLVER.STEPS", (8,), "SOLVER.WARMUP_ITERS", 8, "SOLVER.BASE_LR", 0.0002,
        "SOLVER.CHECKPOINT_PERIOD", 6, "MODEL.IOU_BALANCED.LOC_WEIGHT_STEPS", 8,
        "MODEL.EMA.ENABLED", True, "MODEL.EMA.DECAY", 0.9, "TEST.EVAL_PERIOD", 4,
        "SEED", 3, "OUTPUT_DIR", str(folder / output), *words,
    )  # fmt: skip


class Dropping(Trainer):
    """With dropout in the head, whose random state is part of the training."""

    @classmethod
    def build_model(cls, cfg):
        torch.manual_seed(0)  # both trainings start from the same weights
        model = super().build_model(cfg)
        model.head.cls_subnet.append(nn.Dropout(0.3))
        return model


class Killed(Dropping):
    """Killed as by the system in the eighth step, when a checkpoint of the sixth is written."""

    def run_step(self):
        if self.iter == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        super().run_step()


class Terminated(Dropping):
    """The whole process group, data workers too, gets SIGTERM in the third step."""

    def run_step(self):
        if self.iter == 2:
            os.killpg(0, signal.SIGTERM)
        super().run_step()


def train(kind, cfg, resume=False):
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    trainer = kind(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def main(folder, kind, output, *words):
    """What runs in a process of its own; the words are YAML as on a command line."""
    logging.basicConfig(level=logging.INFO)
    register_coco_instances(NAME, {}, f"{folder}/data.json", folder)
    train(globals()[kind], config_of(Path(folder), output, *words))


def start(*args):
    """Run :func:`main` in a process (group) of its own."""
    code = "import sys; from tests.engine.test_resume import main; main(*sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, start_new_session=True
    )


@pytest.fixture
def folder(tmp_path):
    make_data(tmp_path)
    register_coco_instances(NAME, {}, str(tmp_path / "data.json"), str(tmp_path))
    yield tmp_path
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def load(path):
    """A checkpoint, but for the config in it, which says more than what decides the training."""
    content = torch.load(path, weights_only=True)
    content.pop("run", None)
    return content


def check_equal(a, b, where=""):
    """Nested states, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            check_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            check_equal(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def test_killed_and_resumed_is_uninterrupted_bit_for_bit(folder):
    """Also with other numbers of workers, and evaluations at other iterations."""
    train(Dropping, config_of(folder, "whole"))
    expected = load(folder / "whole/model_final.pth")
    assert expected.keys() == {"model", "trainer", "iou_balanced", "data", "ema", "iteration"}

    done = start(folder, "Killed", "killed", WORKERS, "2")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (folder / "killed/model_final.pth").exists()
    shutil.copytree(folder / "killed", folder / "copy")
    for output, workers in (("killed", 0), ("copy", 2)):
        trainer = train(Dropping, config_of(folder, output, WORKERS, workers), resume=True)
        assert trainer.start_iter == 6
        check_equal(load(folder / output / "model_final.pth"), expected)
        average = load(folder / output / "model_ema.pth")["model"]
        check_equal(average, dict(expected["ema"]))
    latest = trainer.storage.latest()
    assert {"bbox/AP", "ema/bbox/AP"} <= latest.keys()
    assert (folder / "copy/ema/inference" / NAME / "coco_instances_results.json").exists()


def test_what_a_truncated_checkpoint_lost_is_trained_again_bit_for_bit(folder, caplog):
    train(Dropping, config_of(folder, "out"))
    expected = load(folder / "out/model_final.pth")
    for name in ("model_final.pth", "model_0000011.pth"):
        os.truncate(folder / "out" / name, 10_000)
    trainer = train(Dropping, config_of(folder, "out"), resume=True)
    assert trainer.start_iter == 6
    check_equal(load(folder / "out/model_final.pth"), expected)
    warnings = [r.getMessage() for r in caplog.records if "trying the one before" in r.getMessage()]
    assert len(warnings) == 2


def test_a_signal_to_the_whole_group_is_a_checkpoint_and_one_line(folder):
    done = start(folder, "Terminated", "out", WORKERS, "2")
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    output = done.stdout + done.stderr
    assert "Traceback" not in output
    assert output.count("stopped by SIGTERM at iteration 2; --resume goes on") == 1
    assert (folder / "out/last_checkpoint").read_text() == "model_0000002.pth"
    assert load(folder / "out/model_0000002.pth")["iteration"] == 2


QUICK = ("MODEL.EMA.ENABLED", False, "DATASETS.TEST", (), "TEST.EVAL_PERIOD", 0)


def test_the_config_s_rate_and_schedule_hold_when_resumed_and_changes_are_named(folder, caplog):
    """As the line on a loss of NaN advises; before, the checkpoint's rate won without a word."""
    train(Trainer, config_of(folder, "out", *QUICK, "SOLVER.MAX_ITER", 2))
    assert "another config" not in caplog.text
    words = ("SOLVER.MAX_ITER", 4, "SOLVER.BASE_LR", 0.0001, "SOLVER.WARMUP_ITERS", 0,
             "SOLVER.STEPS", (3,), "SOLVER.MOMENTUM", 0.8, "SOLVER.IMS_PER_BATCH", 3)  # fmt: skip
    trainer = train(Trainer, config_of(folder, "out", *QUICK, *words), resume=True)
    rates = [x for x, _ in trainer.storage.history("lr").values()]
    assert rates == pytest.approx([0.0001, 0.00001])
    assert {group["momentum"] for group in trainer.optimizer.param_groups} == {0.8}
    (line,) = [r.getMessage() for r in caplog.records if "another config" in r.getMessage()]
    assert "SOLVER.BASE_LR 0.0001 (was 0.0002)" in line
    assert "SOLVER.MOMENTUM 0.8 (was 0.9)" in line
    assert line.endswith("; the images come in another order than without the stop")
    caplog.clear()
    trainer = train(Trainer, config_of(folder, "out", *QUICK, *words), resume=True)
    assert "another config" not in caplog.text
    assert "the checkpoint is of iteration 3, the last of SOLVER.MAX_ITER 4: nothing is left" in (
        caplog.text
    )


class Interrupted(Trainer):
    """Ctrl-C while the second evaluation runs; counts what is evaluated."""

    evaluations = 0

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        cls.evaluations += 1
        if cls.evaluations == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return {"bbox": {"AP": 1.0}}


@pytest.mark.parametrize(("last", "tag"), [(9, "model_0000003.pth"), (4, "model_final.pth")])
def test_an_evaluation_is_broken_off_at_once(folder, monkeypatch, last, tag):
    """Also the one after the training, when all that is trained has been saved."""
    monkeypatch.setattr(Interrupted, "evaluations", 0)
    before = signal.getsignal(signal.SIGINT)
    words = ("SOLVER.MAX_ITER", last, "TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 100)
    with pytest.raises(SystemExit) as caught:
        train(Interrupted, config_of(folder, "out", *words, "MODEL.EMA.ENABLED", False))
    assert caught.value.code == 128 + signal.SIGINT
    assert Interrupted.evaluations == 2
    assert (folder / "out/last_checkpoint").read_text() == tag
    assert load(folder / "out" / tag)["iteration"] == 3
    assert signal.getsignal(signal.SIGINT) is before


def test_a_later_signal_of_the_same_kind_ends_at_once():
    """SIGTERM and then SIGINT do not, as an agent that SIGTERM has ended sends SIGINT.

    Nor does a signal that comes twice within a second, to the process and to its group.
    """
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        with StopSignals():
            for signum, mark in ((signal.SIGTERM, b"1"), (signal.SIGINT, b"2")):
                for _ in range(2):
                    os.kill(os.getpid(), signum)
                os.write(writer, mark)
            time.sleep(1.1 * ONE_SIGNAL)
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    os.close(writer)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert os.read(reader, 10) == b"12"


def test_a_launched_process_outlives_each_sigint_of_its_launchers_threads(monkeypatch):
    """The kernel sends one when each thread of a killed launcher ends."""
    for launcher, code in ((None, -signal.SIGINT), (object(), 0)):
        monkeypatch.setattr(multiprocessing, "parent_process", lambda launcher=launcher: launcher)
        if (child := os.fork()) == 0:
            with StopSignals() as signals:
                os.kill(os.getpid(), signal.SIGINT)
                signals._when -= 2 * ONE_SIGNAL
                os.kill(os.getpid(), signal.SIGINT)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code


def test_a_hang_up_is_a_signal_unless_nohup_ignores_it():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup, too
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(Stopped):
                signals.check()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            signals.check()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def stream(*words, start_iter=0, seed=3, count=8, size=5):
    """Batches of (image, two random numbers), of wide and tall images in turn."""
    cfg = toy_config(
        "SOLVER.IMS_PER_BATCH", 3, "SEED", seed, "DATALOADER.REPEAT_THRESHOLD", 0.3, *words
    )
    dicts = [{"width": 2 - i % 2, "height": 1 + i % 2, "id": i, "annotations": [{"category_id": i}]}
             for i in range(size)]  # fmt: skip
    loader = ResumableLoader(cfg, dicts, draw)
    loader.start_iter = start_iter
    batches = list(itertools.islice(loader, count))
    return [[(x["id"], *x["random"]) for x in batch] for batch in batches]


def draw(d):
    """A mapper with an augmentation's randomness."""
    return {**d, "random": (np.random.rand(), torch.rand(1).item())}


@pytest.mark.parametrize("grouping", [False, True])
@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_the_stream_of_data_goes_on_where_it_was(grouping, sampler):
    words = (
        "DATALOADER.ASPECT_RATIO_GROUPING", grouping, "DATALOADER.SAMPLER_TRAIN", sampler,
        WORKERS, 0,
    )  # fmt: skip
    whole = stream(*words, count=12)
    assert len({x[1] for batch in whole for x in batch}) == 36, "each sample has its own numbers"
    assert all(len({x[0] % 2 for x in batch}) == 1 for batch in whole) == grouping
    for start_iter in (1, 2, 5, 11):
        assert stream(*words, start_iter=start_iter, count=12 - start_iter) == whole[start_iter:]
    assert stream(*words, seed=4, count=12) != whole


@pytest.mark.parametrize("grouping", [False, True])
@pytest.mark.parametrize("workers", [1, 3])
def test_the_stream_is_the_same_with_any_number_of_workers(grouping, workers):
    words = ("DATALOADER.ASPECT_RATIO_GROUPING", grouping, WORKERS)
    expected = stream(*words, 0)
    assert stream(*words, workers) == expected
    assert stream(*words, workers, start_iter=3, count=5) == expected[3:]


def test_the_stream_covers_each_image_once_an_epoch():
    batches = stream("DATALOADER.ASPECT_RATIO_GROUPING", False, WORKERS, 0, count=4, size=6)
    images = [x[0] for batch in batches for x in batch]
    assert sorted(images[:6]) == sorted(images[6:]) == list(range(6))


def test_reading_data_leaves_random_states_alone():
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    stream(WORKERS, 0)
    assert (torch.rand(1), np.random.rand()) == expected


def test_a_step_s_randomness_is_given_by_seed_and_iteration():
    draws = []
    for seed, iteration in ((3, 7), (3, 7), (3, 8), (4, 7)):
        seed_step(seed, iteration)
        draws.append((torch.rand(1).item(), np.random.rand()))
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3


def test_a_drawn_seed_is_resumed():
    """SEED -1 draws one; a seed of one's own stays."""
    cfg = toy_config("SEED", -1, "SOLVER.IMS_PER_BATCH", 2)
    loaders = [ResumableLoader(cfg, [{"width": 1, "height": 1}], draw) for _ in range(2)]
    assert loaders[0].seed != loaders[1].seed
    state = SeedState(loaders[0], -1).state_dict()
    SeedState(loaders[1], 3).load_state_dict(state)
    assert loaders[0].seed != loaders[1].seed
    SeedState(loaders[1], -1).load_state_dict(state)
    assert loaders[0].seed == loaders[1].seed


def test_the_average_of_the_weights_by_hand():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = WeightsAverage(model, 0.9)
    average.start()
    expected = {
        k: v.numpy().astype(np.float64) for k, v in copy.deepcopy(model.state_dict()).items()
    }
    for _ in range(3):
        with torch.no_grad():
            model[0].weight.add_(1.0)
        model(torch.rand(4, 3))
        average.update()
        for name, value in model.state_dict().items():
            expected[name] = 0.9 * expected[name] + 0.1 * value.numpy()
    for name, value in average.state_dict().items():
        if name == "1.num_batches_tracked":
            assert value == 3
        else:
            np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-5)


AMP = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bfloat16")


def test_losses_of_bfloat16_are_float32():
    model, seen = toy_model(*AMP), []
    model.head.cls_score.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    with autocast(model, torch.bfloat16):
        losses = model(toy_batch())
    assert set(seen) == {torch.bfloat16}
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    exact = toy_model()(toy_batch())
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.05)


def test_precisions_resume_in_each_other(folder):
    """bfloat16 on this CPU, then without, and then with it again."""
    words = ["MODEL.EMA.ENABLED", False, "TEST.EVAL_PERIOD", 0, "SOLVER.CHECKPOINT_PERIOD", 2]
    # PyTorch's own bfloat16 gradients of maps of one pixel are wrong on CPUs; these are larger.
    no_test = ["DATASETS.TEST", (), "INPUT.MIN_SIZE_TRAIN", (96,)]
    for steps, amp in ((2, AMP), (4, ()), (6, AMP)):
        cfg = config_of(folder, "out", *words, *no_test, "SOLVER.MAX_ITER", steps, *amp)
        trainer = train(Dropping, cfg, resume=True)
        assert trainer.start_iter == steps - 2
        assert trainer._trainer.precision == (torch.bfloat16 if amp else None)
        assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="PyTorch has no scale on a CPU")
def test_a_scale_is_resumed_where_there_is_one():
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = StepTrainer(model, [], optimizer)
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with_scale = trainer.state_dict()
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    trainer.load_state_dict({k: v for k, v in with_scale.items() if k != "grad_scaler"})
    assert trainer.grad_scaler.get_scale() == 2
    trainer.load_state_dict({**with_scale, "grad_scaler": {}})
    assert trainer.grad_scaler.get_scale() == 2
    trainer.load_state_dict(with_scale)
    assert trainer.grad_scaler.get_scale() == 8


def test_hooks_that_a_checkpoint_holds_run_before_evaluation(folder):
    """That is where a signal stops: the learning rate has moved on, the file is written."""
    kinds = [type(hook) for hook in Trainer(config_of(folder, "out"))._hooks]
    evaluation = kinds.index(hooks.EvalHook)
    assert kinds.index(hooks.LRScheduler) < evaluation
    assert kinds.index(hooks.PeriodicCheckpointer) < evaluation

"""The best checkpoint and the validation losses, in the real trainer on a toy detector."""

import json
import resource
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, JSONWriter, TensorboardXWriter
from torch import nn

from iou_balanced_d2.engine.checkpoint import LossState
from iou_balanced_d2.engine.checks import check_best_metric
from iou_balanced_d2.engine.console import FirstIterations
from iou_balanced_d2.engine.hooks import (
    BestCheckpointer,
    FaultTolerantWriter,
    build_validation_loader,
    losses_without_trace,
    validation_losses,
)
from iou_balanced_d2.engine.trainer import Trainer
from iou_balanced_d2.errors import UserError

from ..toy import THIN, assert_same_state, toy_batch, toy_config, toy_model

NAME, OTHER = "hooked", "hooked_too"


@pytest.fixture
def cfg(tmp_path, own_data):
    """A toy training of 6 steps, 2 images each, on 4 images of one's own."""
    for name in (NAME, OTHER):
        register_coco_instances(name, {}, *own_data)
    yield config_of(tmp_path)
    for name in (NAME, OTHER):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def config_of(folder):
    return toy_config(
        *THIN, "MODEL.RETINANET.NUM_CLASSES", 2,
        "DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (NAME,),
        "INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64, "DATALOADER.NUM_WORKERS", 0,
        "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 6, "SOLVER.STEPS", (5,),
        "SOLVER.CHECKPOINT_PERIOD", 100, "SOLVER.REFERENCE_WORLD_SIZE", 0,
        "OUTPUT_DIR", str(folder / "out"),
    )  # fmt: skip


def scripted(cfg, values, metric="bbox/AP75"):
    """A trainer whose evaluations give these values, one after the other."""
    cfg.merge_from_list(["TEST.BEST_METRIC", metric, "TEST.EVAL_PERIOD", 2])

    class Scripted(Trainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            value = values.pop(0)
            return {"bbox": {"AP": 1.0, "AP75": value, "AP-square": 1.0}}

    Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    return Scripted(cfg)


def best_of(cfg):
    return torch.load(f"{cfg.OUTPUT_DIR}/model_best.pth", weights_only=True)


def test_the_best_is_kept_and_the_training_resumes_from_the_newest(cfg, tmp_path):
    cfg.SOLVER.CHECKPOINT_PERIOD = 2
    trainer = scripted(cfg, [10.0, 30.0, 20.0])
    trainer.resume_or_load(resume=False)
    trainer.train()
    out = tmp_path / "out"
    best = best_of(cfg)
    assert best["iteration"] == 3
    assert {"model", "trainer", "iou_balanced"} <= best.keys()
    assert json.loads((out / "model_best.json").read_text()) == {
        "metric": "bbox/AP75", "value": 30.0, "iteration": 3,
    }  # fmt: skip
    assert (out / "last_checkpoint").read_text() == "model_final.pth"

    # Resumed, 25 is better than the last value, but not than the best; 40 is.
    for value, iteration in ((25.0, 3), (40.0, 10)):
        cfg.SOLVER.MAX_ITER += 2
        trainer = scripted(cfg, [value])
        trainer.resume_or_load(resume=True)
        assert trainer.start_iter == cfg.SOLVER.MAX_ITER - 2
        trainer.train()
        assert best_of(cfg)["iteration"] == iteration


def test_a_training_cut_off_after_a_best_save_resumes_from_the_checkpoint(cfg, tmp_path):
    """Not from the best one, which was written after it."""
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.MAX_ITER = 4, 100
    trainer = scripted(cfg, [10.0, 30.0])
    trainer.resume_or_load(resume=False)
    with pytest.raises(IndexError):  # at the third evaluation
        trainer.train()
    assert best_of(cfg)["iteration"] == 3
    assert (tmp_path / "out/last_checkpoint").read_text() == "model_0000003.pth"
    trainer = scripted(cfg, [])
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 4


def test_a_new_training_forgets_the_best_of_an_old_one(cfg, tmp_path):
    (tmp_path / "out").mkdir()
    old = {"metric": "bbox/AP75", "value": 90.0, "iteration": 3}
    (tmp_path / "out/model_best.json").write_text(json.dumps(old))
    trainer = scripted(cfg, [10.0, float("nan"), 5.0])
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert best_of(cfg)["iteration"] == 1


def test_a_kill_before_the_best_is_saved_forgets_it(cfg, tmp_path, monkeypatch):
    """Else its value would be kept without its weights, and nothing worse ever be saved."""
    with monkeypatch.context() as patch:
        patch.setattr(BestCheckpointer, "_best_checking", lambda _: None)
        cfg.SOLVER.CHECKPOINT_PERIOD = 2
        trainer = scripted(cfg, [10.0, 30.0, 20.0])
        trainer.resume_or_load(resume=False)
        trainer.train()
    hook = BestCheckpointer(2, trainer.checkpointer, "bbox/AP75")
    hook.trainer = trainer
    monkeypatch.setattr(hook._checkpointer, "save", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hook._best_checking()
    assert not (tmp_path / "out/model_best.json").exists()


class Scores(DatasetEvaluator):
    """Gives these values of AP75, one after the other, whatever is detected."""

    def __init__(self, values):
        self.values = values

    def process(self, inputs, outputs):
        pass

    def evaluate(self):
        return {"bbox": {"AP75": self.values.pop(0)}}


def test_the_best_is_that_of_the_test_set_named(cfg, tmp_path):
    cfg.merge_from_list(
        ["DATASETS.TEST", (NAME, OTHER), "TEST.BEST_METRIC", f"{OTHER}/bbox/AP75",
         "TEST.EVAL_PERIOD", 2]
    )  # fmt: skip
    evaluators = {NAME: Scores([90.0, 10.0, 10.0]), OTHER: Scores([10.0, 30.0, 20.0])}

    class Scripted(Trainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name):
            return evaluators[dataset_name]

    (tmp_path / "out").mkdir()
    Scripted(cfg).train()
    assert best_of(cfg)["iteration"] == 3


@pytest.mark.parametrize(
    ("metric", "is_one"),
    [
        (f"{NAME}/bbox/AP75", True),
        (f"{OTHER}/bbox/AP-circle", True),
        (f"ema/{OTHER}/bbox/APs", True),
        (f"tta/{NAME}/bbox/AP50", True),
        ("bbox/AP75", False),
        ("ema/bbox/AP75", False),
        (f"{NAME}/ema/bbox/AP75", False),
        ("hooked_one/bbox/AP75", False),
    ],
)
def test_metrics_of_several_test_sets_name_one(cfg, metric, is_one):
    cfg.merge_from_list(
        ["DATASETS.TEST", (NAME, OTHER), "TEST.BEST_METRIC", metric, "MODEL.EMA.ENABLED", True,
         "TEST.AUG.ENABLED", True]
    )  # fmt: skip
    for name in (NAME, OTHER):
        DatasetCatalog.get(name)  # from here on its classes are known
    if is_one:
        check_best_metric(cfg)
    else:
        with pytest.raises(UserError, match=r"did you mean '.*hooked(_too)?/bbox/AP75'"):
            check_best_metric(cfg)


def test_a_metric_of_the_end_is_looked_for_at_the_end(cfg):
    cfg.merge_from_list(["TEST.BEST_METRIC", "tta/bbox/AP", "TEST.EVAL_PERIOD", 2])
    (hook,) = (h for h in Trainer(cfg)._hooks if isinstance(h, BestCheckpointer))
    assert hook._period == 0


def test_missed_results_lose_no_file(cfg, tmp_path):
    cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP", 99.0, 0.1]]
    cfg.MODEL.EMA.ENABLED = True
    trainer = scripted(cfg, [1.0] * 6)
    trainer.resume_or_load(resume=False)
    with pytest.raises(SystemExit):
        trainer.train()
    assert (tmp_path / "out/model_ema.pth").exists()
    assert (tmp_path / "out/curves.png").exists()


def test_order_of_hooks(cfg):
    cfg.merge_from_list(["TEST.BEST_METRIC", "bbox/AP", "TEST.LOSS_PERIOD", 5])
    names = [type(hook) for hook in Trainer(cfg)._hooks]
    assert names == [
        hooks.IterationTimer, hooks.LRScheduler, hooks.PeriodicCheckpointer, hooks.EvalHook,
        FirstIterations, hooks.EvalHook, BestCheckpointer, hooks.PeriodicWriter,
    ]  # fmt: skip
    cfg.merge_from_list(["TEST.BEST_METRIC", "", "TEST.LOSS_PERIOD", 0])
    assert [type(hook) for hook in Trainer(cfg)._hooks] == [*names[:5], names[-1]]


def test_validation_losses_are_logged_and_can_be_the_metric(cfg, tmp_path):
    cfg.merge_from_list(
        ["TEST.LOSS_PERIOD", 2, "TEST.BEST_METRIC", "validation/total_loss", "SOLVER.BASE_LR", 1e-4]
    )
    (tmp_path / "out").mkdir()
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    names = ("total_loss", "loss_cls", "loss_box_reg")
    curves = [trainer.storage.history(f"validation/{name}").values() for name in names]
    assert [iteration for _, iteration in curves[0]] == [1, 3, 6]
    for (total, _), (loss_cls, _), (loss_box_reg, _) in zip(*curves, strict=True):
        assert total == pytest.approx(loss_cls + loss_box_reg)
    best = json.loads((tmp_path / "out/model_best.json").read_text())
    assert (best["value"], best["iteration"]) == min(curves[0])
    assert best_of(cfg)["iteration"] == best["iteration"]
    lines = (tmp_path / "out/metrics.json").read_text().splitlines()
    assert json.loads(lines[-1])["validation/total_loss"] == pytest.approx(curves[0][-1][0])


def test_validation_losses_are_the_training_losses_in_inference_mode(cfg):
    """Of the same images, normalisation and dropout as in inference: by hand, batch by batch."""
    model = toy_model("MODEL.RETINANET.NUM_CLASSES", 2)
    model.head.cls_subnet.append(nn.Dropout(0.5))
    loader = build_validation_loader(cfg)
    result = validation_losses(model, loader, 2)["validation"]
    model.eval()
    model.training = True
    with torch.no_grad():
        parts = [model(inputs) for inputs in loader]
    assert len(parts) == 2
    for name in ("loss_cls", "loss_box_reg"):
        expected = sum(float(p[name]) for p in parts) / 2
        assert result[name] == pytest.approx(expected, rel=1e-6)
    assert result["total_loss"] == pytest.approx(result["loss_cls"] + result["loss_box_reg"])


def test_a_last_batch_of_fewer_images_counts_by_its_images():
    """Three images that are all the same: their mean is each one's loss, whatever the batches."""
    model, image = toy_model(), toy_batch()[0]
    whole = validation_losses(model, [[image] * 2, [image] * 2], 2)["validation"]
    part = validation_losses(model, [[image] * 2, [image]], 2)["validation"]
    assert part == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("architecture", ["IoUBalancedRetinaNet", "RetinaNet"])
def test_no_trace_in_the_model(architecture):
    model = toy_model("MODEL.META_ARCHITECTURE", architecture)
    model.train()
    model.backbone.eval()
    with EventStorage():
        sum(model(toy_batch()).values()).backward()
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    numbers = [{k: v for k, v in vars(m).items() if isinstance(v, float)} for m in model.modules()]
    losses = LossState(model).state_dict()
    validation_losses(model, [toy_batch()], 2)
    assert [m.training for m in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert numbers == [
        {k: v for k, v in vars(m).items() if isinstance(v, float)} for m in model.modules()
    ]
    assert_same_state(LossState(model).state_dict(), losses)


def test_number_kept_for_the_first_time_is_forgotten():
    """Stock RetinaNet's normaliser starts as an attribute it does not yet have."""
    module = nn.Module()
    with losses_without_trace(module):
        module.normalizer = 3.0
    assert not hasattr(module, "normalizer")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def worker(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    shares = [[toy_batch()], []]  # a process may have nothing to do
    halves = [[toy_batch()[:1]], [toy_batch()[1:]]]
    model = toy_model()
    results = [validation_losses(model, s[rank], n) for s, n in ((shares, 2), (halves, 1))]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_mean_over_all_images(tmp_path):
    mp.start_processes(worker, (free_port(), str(tmp_path)), nprocs=2, start_method="fork")
    first, second = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert second == [{}, {}]
    together = validation_losses(toy_model(), [toy_batch()], 2)["validation"]
    assert first[0]["validation"] == pytest.approx(together, rel=1e-6)
    one_by_one = validation_losses(toy_model(), [[x] for x in toy_batch()], 1)["validation"]
    assert first[1]["validation"] == pytest.approx(one_by_one, rel=1e-6)


# TensorBoard writes in its own thread; its error is raised by the next write.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_for_the_scalars_is_a_warning_and_the_training_goes_on(tmp_path, caplog):
    """A limit on the files' size stands for the full disk; metrics.json goes on when it ends."""
    file = tmp_path / "metrics.json"
    writers = [
        FaultTolerantWriter(w) for w in (JSONWriter(str(file)), TensorboardXWriter(tmp_path))
    ]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with EventStorage(0) as storage:
        for i in range(30):
            storage.iter = i
            storage.put_scalars(**{f"scalar{j}": float(i) for j in range(20)})
            storage.put_histogram("histogram", torch.rand(10))
            limit = 2000 if 5 <= i < 20 else soft
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                for writer in writers:
                    writer.write()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert not storage._histograms
        for writer in writers:
            writer.close()
    warnings = [r.getMessage() for r in caplog.records if "can't be written" in r.getMessage()]
    assert (
        "JSONWriter's file in OUTPUT_DIR can't be written: [Errno 27] File too large" in warnings[0]
    )
    assert len(warnings) <= 2, "one for each writer"
    assert json.loads(file.read_text().splitlines()[-1])["iteration"] == 29

"""The trainer's own parts: gradient clipping of the whole model, and the losses' saved state."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from iou_balanced_d2.engine.checkpoint import LossState
from iou_balanced_d2.engine.train_step import StepTrainer
from iou_balanced_d2.engine.trainer import Trainer

from ..toy import toy_batch, toy_config, toy_model


def test_full_model_clips_the_norm_of_all_gradients_together():
    cfg = toy_config(
        "SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model",
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 5.0, "SOLVER.BASE_LR", 1.0, "SOLVER.MOMENTUM", 0.0,
        "SOLVER.WEIGHT_DECAY", 0.0,
    )  # fmt: skip
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = Trainer.build_optimizer(cfg, model)
    for p in model.parameters():
        p.grad = torch.full_like(p, 10.0)
    optimizer.step()
    step = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])
    torch.testing.assert_close(step.norm(), torch.tensor(5.0))


def test_loss_state_goes_from_model_to_model():
    model, other = toy_model(), toy_model()
    model.iou_balanced_loss.w_loc_measurement.w_loc.fill_(2.5)
    model.iou_balanced_loss.num_pos_ema.fill_(7.0)
    LossState(other).load_state_dict(LossState(model).state_dict())
    assert other.iou_balanced_loss.w_loc_measurement.w_loc == 2.5
    assert other.iou_balanced_loss.num_pos_ema == 7
    assert LossState(toy_model("MODEL.META_ARCHITECTURE", "RetinaNet")).state_dict() == {
        "losses": []
    }


def test_a_plain_detectors_checkpoint_leaves_the_state_fresh():
    model = toy_model()
    LossState(model).load_state_dict({"losses": []})
    assert model.iou_balanced_loss.num_pos_ema == 100
    state = LossState(model).state_dict()
    LossState(nn.Linear(1, 1)).load_state_dict(state)  # the other way round
    with pytest.raises(ValueError, match="longer"):
        LossState(model).load_state_dict({"losses": state["losses"] * 2})


def test_the_schedule_is_scaled_to_the_number_of_processes(monkeypatch):
    """One of two processes, in one: half the batch and rate, twice the iterations."""
    cfg = toy_config(
        "SOLVER.REFERENCE_WORLD_SIZE", 2, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.BASE_LR", 0.02,
        "SOLVER.MAX_ITER", 30, "SOLVER.STEPS", (10, 20), "SOLVER.WARMUP_ITERS", 0,
    )  # fmt: skip
    batches = []

    def build_train_loader(trainer, cfg):
        batches.append(cfg.SOLVER.IMS_PER_BATCH)
        return [toy_batch()]

    monkeypatch.setattr(Trainer, "build_train_loader", build_train_loader)
    trainer = Trainer(cfg)
    assert batches == [2]
    assert trainer.max_iter == 60
    rates = []
    for trainer.scheduler.last_epoch in (0, 19, 20, 39, 40, 59):
        rates += trainer.scheduler.get_lr()[:1]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])


def test_a_model_may_return_one_loss():
    class OneLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, inputs):
            return self.weight.sum()

    model = OneLoss()
    trainer = StepTrainer(model, [[{}]] * 2, torch.optim.SGD(model.parameters(), 0.5))
    trainer.iter = 0
    with EventStorage(0):
        trainer.run_step()
    assert model.weight.item() == 0.5

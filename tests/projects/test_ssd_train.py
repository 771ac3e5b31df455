"""SSD's configs, its scripts, and training as a user runs it."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.env import seed_all_rng

from iou_balanced_d2.commands.demo import load_predictor
from iou_balanced_d2.data import register_datasets_of
from iou_balanced_d2.data.demo import DemoSpec, ensure_demo_datasets
from iou_balanced_d2.engine import Trainer, load_config

from .ssd_toy import CONFIGS, toy_config, toy_model

ROOT = CONFIGS.parents[2]


@pytest.mark.parametrize(
    ("config", "batch", "rate", "images", "drops"),
    [
        ("COCO-Detection/ssd300_VGG16", 64, 2e-3, 5 * 117266, (16, 22)),
        ("COCO-Detection/ssd512_VGG16", 16, 2e-3, 5 * 117266, (16, 22)),
        ("PascalVOC-Detection/ssd300_VGG16", 32, 1e-3, 10 * 16551, (16, 20)),
        ("PascalVOC-Detection/ssd512_VGG16", 28, 0.875e-3, 10 * 16551, (16, 20)),
    ],
)
def test_schedules_are_the_papers(config, batch, rate, images, drops):
    cfg = load_config(str(CONFIGS / f"{config}_iou_balanced.yaml"))
    solver, ssd = cfg.SOLVER, cfg.MODEL.SSD
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.WEIGHT_DECAY) == (batch, rate, 5e-4)
    assert solver.REFERENCE_WORLD_SIZE == 2
    assert solver.STEPS == tuple(round(drop * images / batch) for drop in drops)
    assert round(24 * images / batch) == solver.MAX_ITER
    assert (ssd.NMS_THRESH_TEST, ssd.SCORE_THRESH_TEST) == (0.45, 0.02)
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 200


def test_eight_images_are_learnt_by_heart(tmp_path):
    """Trainer, loaders, losses, evaluation: AP50 over 80 on what was trained on."""
    folder = ensure_demo_datasets(str(tmp_path), DemoSpec(num_train=8, num_val=1))
    name = "eight_for_ssd"
    data_set = (name, str(folder / "annotations/train.json"), str(folder / "train"))
    cfg = toy_config(
        "MODEL.SSD.NUM_CLASSES", 5,
        "DATASETS.COCO_JSON", (data_set,),
        "DATASETS.TRAIN", (name,),
        "DATASETS.TEST", (name,),
        "DATALOADER.NUM_WORKERS", 0,
        "INPUT.SSD_AUG", False,
        "INPUT.RANDOM_FLIP", "none",
        "SOLVER.REFERENCE_WORLD_SIZE", 0,
        "SOLVER.IMS_PER_BATCH", 8,
        "SOLVER.BASE_LR", 0.03,
        "SOLVER.WARMUP_ITERS", 10,
        "SOLVER.MAX_ITER", 45,
        "SOLVER.STEPS", (38,),
        "SOLVER.CLIP_GRADIENTS.ENABLED", True,
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model",
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 35.0,
        "TEST.EVAL_PERIOD", 0,
        "TEST.EXPECTED_RESULTS", [["bbox", "AP50", 90.0, 10.0]],
        "OUTPUT_DIR", str(tmp_path),
    )  # fmt: skip
    seed_all_rng(1)
    register_datasets_of(cfg)
    try:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        results = trainer.train()
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert results["bbox"]["AP50"] > 80
    state = torch.load(tmp_path / "model_final.pth", weights_only=False)
    assert float(state["iou_balanced"]["losses"][0]["w_loc_measurement"]["w_loc"]) > 1


def test_the_demo_shows_it_images_of_its_own_size(tmp_path):
    weights = tmp_path / "w.pth"
    torch.save(toy_model().state_dict(), weights)
    predictor = load_predictor(toy_config("MODEL.WEIGHTS", str(weights)))
    sizes = []
    predictor.model.backbone.register_forward_pre_hook(lambda _, x: sizes.append(x[0].shape[2:]))
    predictor(np.zeros((75, 50, 3), np.uint8))
    assert sizes == [(128, 128)]

"""The config keys of this project, on top of detectron2's."""

from dataclasses import asdict

from detectron2.config import CfgNode

from ..losses import LossOptions
from ..projects import add_project_configs


def add_iou_balanced_config(cfg: CfgNode) -> None:
    """Add the keys of this package and of its projects, with defaults, to detectron2's config.

    With them every ``config.yaml`` that ``train_net.py`` has written can be read.
    """
    # The losses; LossOptions describes the keys.
    cfg.MODEL.IOU_BALANCED = CfgNode({k.upper(): v for k, v in asdict(LossOptions()).items()})

    # The moving average of the weights over the steps, average = DECAY * average + (1 - DECAY) *
    # weights: evaluated beside the weights, as "ema/...", resumed, and written to model_ema.pth at
    # the end of the training.
    cfg.MODEL.EMA = CfgNode()
    cfg.MODEL.EMA.ENABLED = False
    cfg.MODEL.EMA.DECAY = 0.999

    # The type in which SOLVER.AMP.ENABLED computes matrix products: "float16" (detectron2's; on a
    # GPU only) or "bfloat16" (on a CPU, too). The losses are computed in float32.
    cfg.SOLVER.AMP.PRECISION = "float16"

    # Your own data sets, each [name, annotations JSON in COCO format, image folder]. They are
    # registered under that name, for DATASETS.TRAIN and DATASETS.TEST. Paths are relative to the
    # folder in which the command is run.
    cfg.DATASETS.COCO_JSON = ()
    # The same for folders of PASCAL VOC's layout, each [name, folder, split] or [name, folder,
    # split, list of class names]; without a list the classes are the sorted names found in all of
    # the folder's annotations.
    cfg.DATASETS.VOC_FOLDER = ()
    # The same for YOLO's layout, each [name, data.yaml, split], the split being train, val or test.
    cfg.DATASETS.YOLO_FOLDER = ()
    # VOC's objects marked difficult: "ignore" = left out of training, and in evaluation neither
    # right nor wrong, VOC's own rule; "count" = like any other object; "drop" = as if they were
    # not annotated.
    cfg.DATASETS.VOC_DIFFICULT = "ignore"

    # The metric by which the best checkpoint is kept, as model_best.pth: "bbox/AP75", with several
    # test sets "<data set>/bbox/AP75"; or "validation/total_loss". "" = none.
    cfg.TEST.BEST_METRIC = ""
    # With --eval-only, write a page that compares the detections' scores with their boxes' IoU, to
    # OUTPUT_DIR/inference/<data set>/alignment.
    cfg.TEST.ALIGNMENT_REPORT = False
    # Log the losses on DATASETS.TEST every so many iterations and after the last one, as
    # validation/loss_cls and so on. 0 = never.
    cfg.TEST.LOSS_PERIOD = 0

    add_project_configs(cfg)


def loss_options(cfg: CfgNode) -> LossOptions:
    """The keys of ``MODEL.IOU_BALANCED``, checked.

    Raises:
        ValueError: if a value is out of its range; the message names the key.
    """
    return LossOptions(**{key.lower(): value for key, value in cfg.MODEL.IOU_BALANCED.items()})

"""The config keys of this project, on top of detectron2's."""

from typing import Any

from detectron2.config import CfgNode


def add_iou_balanced_config(cfg: CfgNode) -> None:
    """Add the project's keys, with their defaults, to detectron2's config."""
    cfg.MODEL.IOU_BALANCED = CfgNode()
    # eta of eq. 2: positives' classification loss is weighted by IoU^eta, its sum kept.
    # 0.0 is the plain focal loss.
    cfg.MODEL.IOU_BALANCED.CLS_ETA = 1.5
    # Within what eq. 2 keeps the sum: "batch" = all positives of this process, the equation as
    # written; "level" = each pyramid level, the author's RetinaNet code; "image" = each image,
    # his SSD code; "global" = the positives of all processes.
    cfg.MODEL.IOU_BALANCED.CLS_NORM_SCOPE = "batch"
    # lambda of eq. 4: positives' box loss is weighted by w_loc * IoU^lambda.
    # 0.0 is the plain box loss (times w_loc).
    cfg.MODEL.IOU_BALANCED.LOC_LAMBDA = 1.5
    # w_loc of eq. 4. 0.0 = measure it by LOC_WEIGHT_RULE; any other value is used as it is (the
    # author's, tuned by hand: 3.049 for R50 on COCO, 2.34 on VOC).
    cfg.MODEL.IOU_BALANCED.LOC_WEIGHT = 0.0
    # How w_loc is measured, so that the sum of the box loss stays what it was: "first" = at the
    # first step, then kept, the paper's words; "anchors" = the same with the anchors for the boxes,
    # what the paper's rule comes to for heads that start at 0 as its own do (2.4 on photos), and
    # right also for heads that start at noise, where "first" gave 4.6 to 6.2 (MODEL_ZOO.md); not
    # for FCOS, and for fine-tuning "first" is right; "warmup" = over the SOLVER.WARMUP_ITERS steps
    # of the warm-up, then kept; "running" = at every step anew, eq. 5.
    cfg.MODEL.IOU_BALANCED.LOC_WEIGHT_RULE = "anchors"
    # What the losses are divided by: "ema" = the moving average of the number of positives,
    # detectron2's rule; "batch" = the number of positives of this step, the author's code.
    cfg.MODEL.IOU_BALANCED.NORMALIZER = "ema"

    # The moving average of the weights over the steps, average = DECAY * average + (1 - DECAY) *
    # weights: evaluated beside the weights, as "ema/...", resumed, and written to model_ema.pth at
    # the end of the training.
    cfg.MODEL.EMA = CfgNode()
    cfg.MODEL.EMA.ENABLED = False
    cfg.MODEL.EMA.DECAY = 0.999

    # What SOLVER.AMP.ENABLED computes matrix products in: "float16" (detectron2's; on a GPU only)
    # or "bfloat16" (on a CPU, too). The losses are computed in float32.
    cfg.SOLVER.AMP.PRECISION = "float16"

    # One's own data sets, each [name, annotations JSON in COCO format, image folder]: registered
    # under that name, for DATASETS.TRAIN and DATASETS.TEST. Paths are relative to the folder the
    # command is run in.
    cfg.DATASETS.COCO_JSON = ()
    # The same for folders of PASCAL VOC's layout, each [name, folder, split] or [name, folder,
    # split, list of class names]; without a list the classes are the sorted names found in all of
    # the folder's annotations.
    cfg.DATASETS.VOC_FOLDER = ()
    # The same for YOLO's layout, each [name, data.yaml, split], the split being train, val or test.
    cfg.DATASETS.YOLO_FOLDER = ()
    # VOC's objects marked difficult: "ignore" = no part in training, and in evaluation neither
    # right nor wrong, VOC's own rule; "count" = like any other object; "drop" = as if they were
    # not annotated.
    cfg.DATASETS.VOC_DIFFICULT = "ignore"

    # The evaluation's result of which the best checkpoint is kept, as model_best.pth: "bbox/AP75",
    # with several test sets "<data set>/bbox/AP75"; or "validation/total_loss". "" = none.
    cfg.TEST.BEST_METRIC = ""
    # With --eval-only, write a page that compares the detections' scores with their boxes' IoU, to
    # OUTPUT_DIR/inference/<data set>/alignment.
    cfg.TEST.ALIGNMENT_REPORT = False
    # Every so many iterations, and after the last, the losses on DATASETS.TEST are logged as
    # validation/loss_cls and so on. 0 = never.
    cfg.TEST.LOSS_PERIOD = 0


def iou_balanced_args(cfg: CfgNode) -> dict[str, Any]:
    """The keys of ``MODEL.IOU_BALANCED`` as arguments: each key's name in lower case.

    Returns:
        arguments of :class:`IoUBalancedLoss`.
    """
    keys = {key.lower(): value for key, value in cfg.MODEL.IOU_BALANCED.items()}
    return {**keys, "warmup_iters": cfg.SOLVER.WARMUP_ITERS}

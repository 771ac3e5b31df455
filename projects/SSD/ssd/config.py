"""The config keys of SSD, on top of detectron2's and the project's."""

from detectron2.config import CfgNode


def add_ssd_config(cfg: CfgNode) -> None:
    """Add ``MODEL.SSD`` and ``INPUT.SSD_AUG``, with the defaults of SSD300 on COCO."""
    cfg.MODEL.SSD = CfgNode()
    # K; background is one more column of the scores.
    cfg.MODEL.SSD.NUM_CLASSES = 80
    # Every image is resized to SIZE x SIZE pixels, its aspect ratio not kept.
    cfg.MODEL.SSD.SIZE = 300
    # The layers after the last feature map of the backbone, each a 1x1 convolution to the first
    # number of channels and a convolution of [.., channels, kernel, stride, padding]; each gives
    # one more feature map.
    cfg.MODEL.SSD.EXTRA_LAYERS = [
        [256, 512, 3, 2, 1],
        [128, 256, 3, 2, 1],
        [128, 256, 3, 1, 0],
        [128, 256, 3, 1, 0],
    ]
    # Default boxes: the side s_k of each of the L feature maps' smallest square, as a share of
    # SIZE, and one more. Each place has a square of s_k, one of sqrt(s_k * s_(k+1)), and for each
    # ratio r of ASPECT_RATIOS a box of area s_k^2 that is r times as wide as high, and one that is
    # r times as high as wide. Sides are at most SIZE.
    cfg.MODEL.SSD.SCALES = [0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05]
    cfg.MODEL.SSD.ASPECT_RATIOS = [[2], [2, 3], [2, 3], [2, 3], [2], [2]]
    # Pixels between the centres of neighbouring default boxes, for each feature map.
    cfg.MODEL.SSD.STEPS = [8, 16, 32, 64, 100, 300]
    # A default box is a positive from this IoU on; each ground truth's best box is one, too.
    cfg.MODEL.SSD.IOU_THRESHOLD = 0.5
    # Hard negatives of an image for each of its positives; the other negatives have no loss.
    cfg.MODEL.SSD.NEG_POS_RATIO = 3.0
    # The inverse of the variances (.1, .1, .2, .2).
    cfg.MODEL.SSD.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
    # Knee of smooth L1.
    cfg.MODEL.SSD.SMOOTH_L1_LOSS_BETA = 1.0
    # Detections below this score are dropped; the paper's set-up.
    cfg.MODEL.SSD.SCORE_THRESH_TEST = 0.02
    # The best of each class that go into the class's non-maximum suppression at NMS_THRESH_TEST.
    # TEST.DETECTIONS_PER_IMAGE of an image are kept after it.
    cfg.MODEL.SSD.TOPK_CANDIDATES_TEST = 400
    cfg.MODEL.SSD.NMS_THRESH_TEST = 0.45
    # SSD's augmentation in training: colours, zooming out, cropping, flipping. False: resizing and
    # flipping alone.
    cfg.INPUT.SSD_AUG = True

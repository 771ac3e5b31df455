"""The config keys of FCOS; defaults are those of detectron2's ``fcos_R_50_FPN_1x.py``."""

from detectron2.config import CfgNode


def add_fcos_config(cfg: CfgNode) -> None:
    """Add ``MODEL.FCOS`` to detectron2's config."""
    cfg.MODEL.FCOS = CfgNode()
    # K, as detectron2's MODEL.RETINANET.NUM_CLASSES.
    cfg.MODEL.FCOS.NUM_CLASSES = 80
    # Levels of the pyramid, from high to low resolution.
    cfg.MODEL.FCOS.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Convolutions of each of the head's two subnets, and their normalisation ("" = none).
    cfg.MODEL.FCOS.NUM_CONVS = 4
    cfg.MODEL.FCOS.NORM = "GN"
    # The score all classes start with, by the bias of the last layer.
    cfg.MODEL.FCOS.PRIOR_PROB = 0.01
    # Points of a box nearer to its centre than this many strides are positive.
    cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS = 1.5
    # The focal loss, before eq. 2 weights it: the weight alpha of positives (negatives have
    # 1 - alpha), and the power gamma by which easy ones lose weight.
    cfg.MODEL.FCOS.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.FCOS.FOCAL_LOSS_GAMMA = 2.0
    # A detection's score is sqrt(class score * centerness): higher than RetinaNet's, whose
    # threshold is 0.05.
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.2
    # Detections of each level that go into NMS.
    cfg.MODEL.FCOS.TOPK_CANDIDATES_TEST = 1000
    # Of two boxes of a class that overlap by more than this IoU the one of lower score is dropped.
    cfg.MODEL.FCOS.NMS_THRESH_TEST = 0.6

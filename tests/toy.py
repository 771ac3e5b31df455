"""A tiny RetinaNet and batches for it, for tests that need a whole detector in milliseconds."""

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch.utils._pytree import tree_flatten

from iou_balanced_d2 import add_iou_balanced_config
from iou_balanced_d2.model_zoo import get_config_file

NUM_CLASSES = 3
CONFIG = "COCO-Detection/retinanet_R_50_FPN_1x_iou_balanced.yaml"
# A backbone of few channels: its checkpoints have some megabytes, ResNet-18's a hundred.
THIN = [
    "MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.RESNETS.STEM_OUT_CHANNELS", 4,
]  # fmt: skip


def assert_same_state(one, other):
    """Compare training states, nested dicts of tensors, numbers and words, bit for bit."""
    (leaves, names), (others, other_names) = tree_flatten(one), tree_flatten(other)
    assert names == other_names
    for x, y in zip(leaves, others, strict=True):
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, rtol=0, atol=0)
        else:
            assert x == y


def toy_config(*opts, config=CONFIG):
    """Config of a small ResNet-18 RetinaNet on the CPU, with KEY VALUE overrides."""
    cfg = get_cfg()
    add_iou_balanced_config(cfg)
    cfg.merge_from_file(get_config_file(config), allow_unsafe=False)
    cfg.merge_from_list(
        [
            "MODEL.DEVICE", "cpu",
            "MODEL.WEIGHTS", "",
            "MODEL.RESNETS.DEPTH", 18,
            "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
            "MODEL.RESNETS.NORM", "BN",
            "MODEL.BACKBONE.FREEZE_AT", 0,
            "MODEL.FPN.OUT_CHANNELS", 16,
            "MODEL.RETINANET.NUM_CONVS", 1,
            "MODEL.RETINANET.NUM_CLASSES", NUM_CLASSES,
        ]
    )  # fmt: skip
    cfg.merge_from_list(list(opts))
    return cfg


def toy_model(*opts, **kwargs):
    """The model of :func:`toy_config`, seeded."""
    torch.manual_seed(0)
    return build_model(toy_config(*opts, **kwargs))


def toy_inputs(boxes=((10, 12, 60, 70),), classes=(0,), size=(96, 128), seed=0):
    """One training input: a random image with the boxes (XYXY) and classes given."""
    rng = torch.Generator().manual_seed(seed)
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    image = torch.randint(0, 255, (3, *size), generator=rng, dtype=torch.uint8)
    return {"image": image, "instances": instances, "height": size[0], "width": size[1]}


def toy_batch():
    """Two images: one with objects (and so ignored anchors), one without any."""
    busy = toy_inputs(((10, 12, 60, 70), (40, 20, 110, 90), (5, 60, 25, 90)), (0, 2, 1))
    return [busy, toy_inputs((), (), seed=1)]

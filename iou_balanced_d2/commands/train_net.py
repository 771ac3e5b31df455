"""Train or evaluate a detector from a config file, with detectron2's flags.

python train_net.py --config-file configs/COCO-Detection/retinanet_R_50_FPN_1x_iou_balanced.yaml

In several processes with --num-gpus, on several machines with --num-machines, or under torchrun:
docs/distributed.md.
"""

import argparse
from functools import partial

from ..engine import find_placement, launch, main, prepare
from ..engine.agreement import facts_of


def run(args: argparse.Namespace) -> int:
    """Check everything, then launch the run."""
    placement = find_placement(args)
    cfg = prepare(args, placement)
    facts = facts_of(cfg, args)
    return launch(partial(main, cfg), args, placement, device=cfg.MODEL.DEVICE, facts=facts)

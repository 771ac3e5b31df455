#!/usr/bin/env python
"""Train or evaluate a detector from a config file, with detectron2's flags.

python train_net.py --config-file configs/COCO-Detection/retinanet_R_50_FPN_1x_iou_balanced.yaml

In several processes with --num-gpus, on several machines with --num-machines, or under torchrun:
docs/distributed.md.
"""

import sys
from functools import partial

from iou_balanced_d2.engine import find_placement, launch, main, parse_arguments, prepare
from iou_balanced_d2.engine.agreement import facts_of
from iou_balanced_d2.errors import UserError, one_line


def run() -> int:
    """Check everything, then launch the run; a user's mistake is one line and exit code 2."""
    try:
        args = parse_arguments()
        placement = find_placement(args)
        cfg = prepare(args, placement)
        facts = facts_of(cfg, args)
        return launch(partial(main, cfg), args, placement, device=cfg.MODEL.DEVICE, facts=facts)
    except UserError as error:
        print(f"train_net.py: error: {one_line(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(run())

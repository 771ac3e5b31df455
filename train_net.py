#!/usr/bin/env python
"""Train or evaluate a detector from a config file, with detectron2's flags.

python train_net.py --config-file configs/COCO-Detection/retinanet_R_50_FPN_1x_iou_balanced.yaml
"""

import sys

from iou_balanced_d2.engine import launch, main, parse_arguments, prepare
from iou_balanced_d2.errors import UserError


def run() -> int:
    """Check everything, then launch the run; a user's mistake is one line and exit code 2."""
    try:
        args = parse_arguments()
        cfg = prepare(args)
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(cfg, args),
        )
    except UserError as error:
        # From a data loader's worker the message comes with the worker's traceback before it.
        message = (
            str(error).strip().splitlines()[-1].removeprefix("iou_balanced_d2.errors.UserError: ")
        )
        print(f"train_net.py: error: {message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run())

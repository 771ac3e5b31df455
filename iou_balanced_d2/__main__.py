"""``python -m iou_balanced_d2 COMMAND``."""

import sys

from .commands import main

if __name__ == "__main__":
    sys.exit(main())

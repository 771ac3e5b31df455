"""IoU-balanced losses for single-stage detectors, as an extension of detectron2.

Importing the package registers its detectors and data sets with detectron2.
"""

import warnings

__version__ = "0.1.0"

try:
    with warnings.catch_warnings():
        # detectron2 calls TorchScript when it is imported; the user can't change that.
        warnings.filterwarnings("ignore", message=".*torch.jit.script")
        import detectron2.modeling  # noqa: F401
except ImportError as error:
    raise ImportError(
        "iou_balanced_d2 extends detectron2, which can't be imported here "
        f"({error}). In a clone of this project run `make setup`; elsewhere install detectron2 "
        "from its source: https://detectron2.readthedocs.io/tutorials/install.html"
    ) from error

from . import data, modeling  # noqa: F401  (registers data sets and meta-architectures)
from .config import add_iou_balanced_config

__all__ = ["__version__", "add_iou_balanced_config"]

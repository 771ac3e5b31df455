"""IoU-balanced losses for single-stage detectors, as an extension of detectron2.

Importing the package registers its detectors and data sets with detectron2.
"""

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import add_iou_balanced_config

__version__ = "0.1.0"
__all__ = ["__version__", "add_iou_balanced_config"]


def register() -> None:
    """Register detectors and data sets with detectron2; again does nothing.

    Raises:
        ImportError: if there is no detectron2.
    """
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
    from . import data, modeling  # noqa: F401  (importing them registers)


def _is_command() -> bool:
    """Whether this process is one of the project's own commands."""
    script, root = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parents[1]
    return (
        script.name == "iou-balanced-d2"
        or sys.orig_argv[1:3] == ["-m", __name__]
        or script == root / "train_net.py"
        or script.parent in (root / "demo", root / "tools")
    )


def __getattr__(name: str) -> Any:
    if name != "add_iou_balanced_config":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .config import add_iou_balanced_config

    register()
    return add_iou_balanced_config


# A command first reads its arguments, which must not take the seconds that detectron2 takes.
if not _is_command():
    register()
    from .config import add_iou_balanced_config

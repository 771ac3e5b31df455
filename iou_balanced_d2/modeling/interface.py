"""What the training reads of a detector, beside detectron2's own interface."""

from typing import Any, ClassVar, Protocol

from detectron2.config import CfgNode
from detectron2.data import transforms as T


class DetectorInterface(Protocol):
    """How the training of a meta-architecture differs from RetinaNet's.

    A detector inherits from this class and overrides what differs. All other detectors have the
    values and methods of this class, see :func:`interface_of`.
    """

    #: The usual learning rate for each image of the batch; a warning compares SOLVER.BASE_LR with
    #: it. This is detectron2's and the paper's of RetinaNet, and detectron2's of FCOS. 0 is none.
    lr_per_image: ClassVar[float] = 0.01 / 16
    #: How many scores each anchor has beside those of the K classes.
    num_background_scores: ClassVar[int] = 0

    @classmethod
    def build_augmentation(
        cls, cfg: CfgNode, is_train: bool
    ) -> list[T.Augmentation | T.Transform] | None:
        """Augmentations in place of detectron2's; they may read "boxes" beside "image".

        Args:
            cfg: the full config.
            is_train: whether for training, with annotations.

        Returns:
            detectron2's augmentations and transforms, or None for those of detectron2.
        """
        return None

    @classmethod
    def check_weights(cls, cfg: CfgNode) -> None:
        """Refuse weights from which the detector does not learn.

        Raises:
            UserError: naming what to pass.
        """


def interface_of(detector: type[Any]) -> type[DetectorInterface]:
    """The detector's own interface if it has one, else the default.

    Args:
        detector: class of the meta-architecture.

    Returns:
        a class; it is not to be instantiated.
    """
    return detector if DetectorInterface in detector.__mro__ else DetectorInterface

"""What a detector may say of itself to the training, beside detectron2's own interface."""

from typing import Any, ClassVar, Protocol

from detectron2.config import CfgNode
from detectron2.data import transforms as T

from ..losses import LossOptions


class DetectorInterface(Protocol):
    """What differs for a meta-architecture from RetinaNet.

    A detector inherits from this class and overrides what it needs to. The values and methods here
    are those of all other detectors, see :func:`interface_of`.
    """

    #: The learning rate for each image of the batch, of which the linear rule is reminded:
    #: detectron2's and the paper's of RetinaNet, and detectron2's of FCOS.
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
    def check_loss_options(cls, options: LossOptions) -> None:
        """Refuse options that this detector can't have.

        Raises:
            ValueError: naming the key.
        """

    @classmethod
    def check_weights(cls, cfg: CfgNode) -> None:
        """Refuse weights that the detector does not train from.

        Raises:
            UserError: naming what to pass.
        """


def interface_of(detector: type[Any]) -> type[DetectorInterface]:
    """The detector's own interface if it has one, or that of all others.

    Args:
        detector: class of the meta-architecture.

    Returns:
        a class; it is not to be instantiated.
    """
    return detector if DetectorInterface in detector.__mro__ else DetectorInterface

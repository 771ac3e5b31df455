"""What is told when a checkpoint has other classes than the model that is to be fine-tuned."""

from collections.abc import Iterable, Sequence

from torch import nn

from ..modeling import interface_of

# A parameter's name, its shape in the checkpoint, and its shape in the model.
Mismatch = tuple[str, Sequence[int], Sequence[int]]


def other_classes_message(model: nn.Module, mismatches: Iterable[Mismatch]) -> str:
    """One line on layers that do not fit because the number of classes is another one.

    Args:
        model: a dense detector with ``num_classes``; its :class:`DetectorInterface` says
            how many scores each anchor has beside the classes'.
        mismatches: what fvcore's checkpointer found, ``incorrect_shapes`` of its result.

    Returns:
        names, both numbers of classes and what becomes of the layers; "" if nothing does not fit,
        or not for this reason alone.
    """
    mismatches = list(mismatches)
    num_classes = getattr(model, "num_classes", None)
    if not (mismatches and isinstance(num_classes, int)):
        return ""
    background = interface_of(type(model)).num_background_scores
    found = {_classes_in_checkpoint(m, num_classes, background) for m in mismatches}
    if len(found) != 1 or found == {0}:
        return ""
    names = ", ".join(sorted(name for name, _, _ in mismatches))
    return (
        f"the checkpoint has {found.pop()} classes and this model {num_classes} (NUM_CLASSES): "
        f"{names} can't be loaded and start anew, to be trained; all other weights that the "
        "checkpoint has are loaded"
    )


def _classes_in_checkpoint(mismatch: Mismatch, num_classes: int, background: int) -> int:
    """The number of classes that a layer's outputs in the checkpoint are for, 0 if for none."""
    _, theirs, ours = mismatch
    if len(theirs) == 0 or len(ours) == 0 or list(theirs[1:]) != list(ours[1:]):
        return 0
    # The outputs are those of A anchors: A * (classes + background).
    num_anchors, rest = divmod(ours[0], num_classes + background)
    if rest or not num_anchors or theirs[0] % num_anchors:
        return 0
    return max(theirs[0] // num_anchors - background, 0)

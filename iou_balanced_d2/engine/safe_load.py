"""Reading checkpoint files without running what may be hidden in them.

A pickle can name any function and have it called while it is read. Here it can name what arrays
and tensors are made of, and nothing else.
"""

import collections
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..errors import UserError

# What numpy names in the pickles of arrays, dtypes and scalars, besides its classes.
_NUMPY_FUNCTIONS = {
    (f"numpy.{core}.{module}", name)
    for core in ("core", "_core")
    for module, name in (
        ("multiarray", "_reconstruct"),
        ("multiarray", "scalar"),
        ("numeric", "_frombuffer"),
    )
}


class BrokenCheckpoint(UserError):
    """A file that can't be read as a checkpoint: missing, truncated or of another kind."""


class _Refused(pickle.UnpicklingError):
    """Something that is neither an array nor a plain container; the message is its name."""


class PlainUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays, containers, strings and numbers."""

    def find_class(self, module: str, name: str) -> Any:
        """Look up what the pickle names.

        Args:
            module: e.g. "numpy".
            name: e.g. "ndarray".

        Returns:
            the class or function.

        Raises:
            pickle.UnpicklingError: for any that arrays and containers do not need.
        """
        allowed: dict[tuple[str, str], Callable[..., Any]] = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("__builtin__", "bytes"): bytes,
        }
        if (module, name) in allowed:
            return allowed[module, name]
        if (module, name) in _NUMPY_FUNCTIONS:
            last = module.rsplit(".", 1)[1]
            return super().find_class(f"numpy.{_numpy_core()}.{last}", name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise _Refused(f"{module}.{name}")


def _numpy_core() -> str:
    return "_core" if int(np.__version__.split(".")[0]) >= 2 else "core"


def read_checkpoint(path: str, *, trust: bool = False) -> dict[str, Any]:
    """Read a checkpoint of this project, of detectron2's model zoo, or of PyTorch.

    Args:
        path: ".pkl" of detectron2's zoo and of Caffe2, ".pyth" of pycls, anything else of
            ``torch.save``.
        trust: read whatever Python objects the file holds. That can run code.

    Returns:
        the weights under "model", tensors on the CPU or arrays; "matching_heuristics" says that
        their names are to be matched to the model's; a training's state besides.

    Raises:
        BrokenCheckpoint: if the file can't be read.
        UserError: if it holds other objects than tensors, arrays and plain containers.
    """
    try:
        content = _read(path, trust)
    except Exception as error:  # a damaged pickle raises nearly anything
        if culprit := _refused(error):
            raise UserError(
                f"checkpoint {path!r} holds {culprit}, not only tensors and plain containers, so "
                "that reading it could run code: give --trust-checkpoint if you trust its origin"
            ) from error
        reason = error.strerror if isinstance(error, OSError) else None
        reason = reason or (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BrokenCheckpoint(f"checkpoint {path!r} can't be read: {reason[:200]}") from error
    if not isinstance(content, dict):
        raise BrokenCheckpoint(f"checkpoint {path!r} is not a dict of weights")
    return _with_model(path, content)


def _read(path: str, trust: bool) -> Any:
    if path.endswith(".pkl"):
        with open(path, "rb") as f:
            # The zoo's files were written by Python 2.
            return (pickle.Unpickler if trust else PlainUnpickler)(f, encoding="latin1").load()
    return torch.load(path, map_location="cpu", weights_only=not trust)


def _refused(error: Exception) -> str:
    """The name of what was refused, "" if the file is just broken."""
    if isinstance(error, _Refused):
        return str(error)
    found = re.search(r"(?:GLOBAL|Unsupported class) (\w[\w.]*)", str(error))
    return found.group(1) if isinstance(error, pickle.UnpicklingError) and found else ""


def _with_model(path: str, content: dict[str, Any]) -> dict[str, Any]:
    """Bring the layouts of other projects' files to detectron2's."""
    if path.endswith(".pyth") and "model_state" in content:
        weights = content["model_state"]
        kept = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
        return {"model": kept, "__author__": "pycls", "matching_heuristics": True}
    if path.endswith(".pkl") and not {"model", "__author__"} <= content.keys():
        weights = content.get("blobs", content)
        kept = {k: v for k, v in weights.items() if not k.endswith("_momentum")}
        return {"model": kept, "__author__": "Caffe2", "matching_heuristics": True}
    return content if "model" in content else {"model": content}

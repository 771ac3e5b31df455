"""Reads checkpoint files without running code that may be hidden in them.

A pickle can name any function and have it called while it is read, and numpy's own functions make
arrays of addresses from bytes. Here a pickle can name only what arrays of numbers are made of, and
gets stand-ins that check their arguments.
"""

import collections
import os
import pickle
import re
import zipfile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

# dtypes of numbers, booleans and strings: no objects (an array of those is one of addresses), and
# nothing made up of other dtypes, which could hide them.
_PLAIN_DTYPE = re.compile(r"[<>=|]?[biufcSU]\d*")


class BrokenCheckpoint(UserError):
    """A file that can't be read as a checkpoint: missing, truncated or of another kind."""


class _Refused(pickle.UnpicklingError):
    """Something that is neither an array nor a plain container; the message is its name."""


class _PlainDtype:
    """Stands for numpy.dtype, which believes whatever a pickle says of its fields."""

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        if not (isinstance(code, str) and _PLAIN_DTYPE.fullmatch(code)):
            raise _Refused(f"numpy.dtype({code!r})")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, order, *parts = state[:5]
        if any(part is not None for part in parts):
            raise _Refused("numpy.dtype of several parts")
        self.dtype = self.dtype.newbyteorder(order)


class _PlainArray(np.ndarray):
    """An array made by a pickle, with a dtype that has been checked."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, dtype, fortran, data = state
        super().__setstate__((version, shape, _checked(dtype), fortran, data))

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Sent to other processes as a plain array.
        return self.view(np.ndarray).__reduce_ex__(protocol)


def _checked(dtype: Any) -> np.dtype[Any]:
    if not isinstance(dtype, _PlainDtype):
        raise _Refused(f"numpy.dtype({dtype!r})")
    return dtype.dtype


def _reconstruct(*_: Any) -> _PlainArray:
    """The empty array that a pickle then gives its state."""
    return _PlainArray.__new__(_PlainArray, (0,), np.uint8)


def _from_buffer(data: bytes, dtype: Any, shape: tuple[int, ...], order: str) -> Any:
    array = np.frombuffer(data, _checked(dtype)).reshape(shape, order=order)  # type: ignore[call-overload]
    return array.copy()  # which can be written to


def _scalar(dtype: Any, data: bytes | str) -> Any:
    content = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(content, _checked(dtype), count=1)[0]


def _encode(text: str, encoding: str) -> bytes:
    """Bytes in pickles of protocol 2."""
    if encoding != "latin1":
        raise _Refused("_codecs.encode")
    return text.encode(encoding)


# What pickles of arrays and containers name -> its stand-in.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): "numpy.ndarray",  # an argument; pickles of arrays do not call it
    ("numpy", "dtype"): _PlainDtype,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): lambda: b"",  # how protocol 2 writes no bytes
}
for _core in ("core", "_core"):
    _ALLOWED[f"numpy.{_core}.multiarray", "_reconstruct"] = _reconstruct
    _ALLOWED[f"numpy.{_core}.multiarray", "scalar"] = _scalar
    _ALLOWED[f"numpy.{_core}.numeric", "_frombuffer"] = _from_buffer


class PlainUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays of numbers and strings, containers, strings and numbers."""

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for what the pickle names, which makes only arrays and containers.

        Raises:
            pickle.UnpicklingError: for names that arrays and containers do not need.
        """
        if (module, name) not in _ALLOWED:
            raise _Refused(f"{module}.{name}")
        return _ALLOWED[module, name]


def read_checkpoint(path: str, *, trust: bool = False) -> dict[str, Any]:
    """Read a checkpoint of this project, of detectron2's model zoo, or of PyTorch.

    Args:
        path: a file of ``torch.save`` or ``pickle.dump``; ".pkl" may have the layout of Caffe2,
            ".pyth" that of pycls.
        trust: read whatever Python objects the file holds. That can run code.

    Returns:
        the weights under "model", tensors on the CPU or arrays; "matching_heuristics" if their
        names must be matched to the model's; the training's state.

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
                "that reading it could run code: train_net.py reads it with "
                "--trust-checkpoint, if you trust its origin"
            ) from error
        reason = error.strerror if isinstance(error, OSError) else None
        reason = reason or (str(error).strip() or type(error).__name__).splitlines()[0]
        if "weights_only" in str(error) or "Weights only" in reason:  # advice to read it unsafely
            reason = "it is damaged, or of another kind than torch.save's"
        raise BrokenCheckpoint(f"checkpoint {path!r} can't be read: {reason[:200]}") from error
    if not isinstance(content, dict):
        raise BrokenCheckpoint(f"checkpoint {path!r} is not a dict of weights")
    return _with_model(path, content)


# How files begin: those of torch.save since 1.6, those before, other pickles (of which Python 2's
# may be text).
_ZIP, _LEGACY = b"PK\3\4", b"\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
_PICKLE = (b"\x80", b"(d", b"ccollections\n")


def _read(path: str, trust: bool) -> Any:
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is not a file")
    with open(path, "rb") as f:
        start = f.read(len(_LEGACY))
        f.seek(0)
        if not start.startswith((_ZIP, _LEGACY)):
            if not start.startswith(_PICKLE):
                raise ValueError("it is empty" if not start else "it is not a file of torch.save")
            # The zoo's files were written by Python 2.
            return (pickle.Unpickler if trust else PlainUnpickler)(f, encoding="latin1").load()
        if start.startswith(_ZIP):
            with zipfile.ZipFile(f) as archive:
                size = sum(part.file_size for part in archive.infolist())
            if size > os.path.getsize(path):  # torch.save does not compress
                raise ValueError(f"its {os.path.getsize(path)} bytes would expand to {size}")
    return torch.load(path, map_location="cpu", weights_only=not trust)


def weights_of(path: str, model: Any) -> dict[str, Tensor]:
    """The weights of a checkpoint as tensors.

    Args:
        path: of the checkpoint, for errors.
        model: what :func:`read_checkpoint` has found.

    Raises:
        BrokenCheckpoint: if it is something else than tensors of numbers by name, or one is NaN.
    """
    if not isinstance(model, dict):
        raise BrokenCheckpoint(f"checkpoint {path!r}: {type(model).__name__} instead of weights")
    # torchvision's VGG16 for SSD has only NaN in its last layers, which SSD leaves out.
    unused: tuple[str, ...] = ("classifier.",) if "features.0.weight" in model else ()
    for name, value in model.items():
        if not isinstance(name, str):
            raise BrokenCheckpoint(f"checkpoint {path!r}: the name {name!r} is not a text")
        if not isinstance(value, Tensor | np.ndarray):
            raise BrokenCheckpoint(
                f"checkpoint {path!r}: {name!r} is a {type(value).__name__}, not a tensor"
            )
        try:
            tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise ValueError("it is larger than its data")
            if tensor.isnan().any() and not name.startswith(unused):
                raise ValueError("it holds NaN")
        except (RuntimeError, TypeError, ValueError) as error:  # e.g. strings, sparse tensors
            reason = str(error).splitlines()[0]
            raise BrokenCheckpoint(f"checkpoint {path!r}: {name!r}: {reason}") from error
        model[name] = tensor  # in place, as a state_dict has attributes of its own
    return model


def _refused(error: Exception) -> str:
    """The name of what was refused, "" if the file is just broken."""
    if isinstance(error, _Refused):
        return str(error)
    found = re.search(r"(?:GLOBAL|Unsupported class) (\w[\w.]*)", str(error))
    return found.group(1) if isinstance(error, pickle.UnpicklingError) and found else ""


def _with_model(path: str, content: dict[str, Any]) -> dict[str, Any]:
    """Bring the layouts of other projects' files to detectron2's."""
    if path.endswith(".pyth") and "model_state" in content:
        kept = _without(content["model_state"], "num_batches_tracked")
        return {"model": kept, "__author__": "pycls", "matching_heuristics": True}
    if path.endswith(".pkl") and "model" not in content:
        kept = _without(content.get("blobs", content), "_momentum")
        return {"model": kept, "__author__": "Caffe2", "matching_heuristics": True}
    return content if "model" in content else {"model": content}


def _without(weights: Any, suffix: str) -> Any:
    """Weights without those of such names; :func:`weights_of` checks what else it may be."""
    if not isinstance(weights, dict):
        return weights
    return {key: value for key, value in weights.items() if not str(key).endswith(suffix)}

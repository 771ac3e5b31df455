"""From a config file and KEY VALUE options to a config; errors name file, key and value."""

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from ..config import add_iou_balanced_config
from ..errors import UserError
from ..files import read_yaml


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Build the config of a run. Config files hold only values: none of them runs code.

    Args:
        config_file: path of a YAML file.
        opts: KEY VALUE pairs that override it.

    Returns:
        the config, not frozen.

    Raises:
        UserError: if the file is missing or broken, or a key or value does not fit.
    """
    cfg = _defaults()
    defaults = flatten(cfg)
    if not os.path.isfile(config_file):
        raise UserError(f"config file {config_file!r} not found")
    keys = set(defaults)
    for key in opts[0::2]:
        if key not in keys:
            raise UserError(_unknown_key(key, keys))
    try:
        _check_file(config_file)
        cfg.merge_from_file(config_file, allow_unsafe=False)
    except Exception as error:
        raise UserError(f"config file {config_file!r}: {_explain(error, keys)}") from error
    try:
        cfg.merge_from_list(list(opts))
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(_explain(error, keys)) from error
    for key, value in flatten(cfg).items():
        if value is None and defaults[key] is not None:
            raise UserError(f"{key} can't be None; {defaults[key]!r} is its default")
        if any(not _is_text(text) for text in _texts(value)):
            raise UserError(f"{key} {value!r} has a character that no name or path can have")
    return cfg


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value of a config."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


def _is_text(text: str) -> bool:
    """Whether the text has no NUL and no byte of another encoding than UTF-8."""
    return "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


def _defaults() -> CfgNode:
    cfg = get_cfg()
    add_iou_balanced_config(cfg)
    return cfg


def settings(config_file: str, opts: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """What the user has set: by KEY VALUE pairs, in the config file, in its _BASE_ and so on.

    Args:
        config_file: as for :func:`load_config`.
        opts: likewise.

    Yields:
        each key with the value that it would have without: of the file, of its _BASE_, ...
    """
    files: list[str] = []

    class Reader(CfgNode):
        @classmethod
        def _open_cfg(cls, filename: str) -> Any:
            files.append(filename)
            return super()._open_cfg(filename)

    Reader.load_yaml_with_base(config_file)
    layers = [load_config(config_file, opts), *map(load_config, files), _defaults()]
    for upper, lower in pairwise(map(flatten, layers)):
        changed = [key for key in upper if upper[key] != lower[key]]
        # A switch is a cause only if nothing that it switches on is.
        changed.sort(key=lambda key: isinstance(lower[key], bool))
        yield from ((key, lower[key]) for key in changed)


def _check_file(path: str, *above: str) -> None:
    """Refuse a file of no known VERSION or that takes forever to read, or whose _BASE_ is so.

    Raises:
        ValueError, yaml.YAMLError: saying why.
    """
    if os.path.realpath(path) in above:
        raise ValueError(f"its _BASE_ {path!r} leads back to itself")
    content = read_yaml(path)
    content = content if isinstance(content, dict) else {}
    if (version := content.get("VERSION", 2)) not in (1, 2):
        raise ValueError(f"VERSION must be 1 or 2, got {version!r}")
    base = content.get("_BASE_")
    if isinstance(base, str) and "://" not in base:
        base = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        _check_file(base, os.path.realpath(path), *above)


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of mappings as one, its keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        below = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{key}.") if below else {f"{prefix}{key}": value}
    return flat


def _unknown_key(key: str, keys: set[str]) -> str:
    if key in keys:
        return f"{key!r} is a key of VERSION 2, which the file does not say it is of"
    close = difflib.get_close_matches(key, keys, n=1)
    return f"unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else "")


def _explain(error: Exception, keys: set[str]) -> str:
    """One line for whatever YAML and yacs raise."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if unknown := re.search(r"Non-existent config key: (\S+)", text):
        return _unknown_key(unknown.group(1), keys)
    if mismatch := re.match(r"Type mismatch \(<class '(\w+)'> .*>\) with .*: (\S+)$", text, re.S):
        return f"{mismatch[2]} must be of type {mismatch[1]}: {' '.join(text.split())}"
    if isinstance(error, FileNotFoundError):
        return f"its _BASE_ {error.filename!r} not found"
    if isinstance(error, yaml.constructor.ConstructorError):
        mark = error.problem_mark  # in the file, or in its _BASE_
        where = f" in line {mark.line + 1} of {mark.name!r}" if mark else ""
        return f"only plain values are allowed: {error.problem}{where}"
    return " ".join(text.split()) or type(error).__name__


def choose_device(cfg: CfgNode, opts: Sequence[str] = ()) -> None:
    """Change MODEL.DEVICE from its default, "cuda", to the CPU where there is no CUDA.

    Raises:
        UserError: if the file or the KEY VALUE pairs ask for a CUDA device and there is none.
    """
    if not cfg.MODEL.DEVICE.startswith("cuda") or torch.cuda.is_available():
        return
    if "MODEL.DEVICE" in opts[0::2] or cfg.MODEL.DEVICE != get_cfg().MODEL.DEVICE:
        raise UserError(f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but no CUDA device is available")
    cfg.MODEL.DEVICE = "cpu"

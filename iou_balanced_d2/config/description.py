"""The meaning of each config key, read from the comment above its default.

The comments are in ``losses/options.py``, ``defaults.py`` and ``projects/*/*/config.py``;
``python -m iou_balanced_d2.config`` prints them.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from detectron2.config import CfgNode, get_cfg

from ..losses import LossOptions
from ..projects import import_projects
from .defaults import add_iou_balanced_config

_WIDTH = 100


class KeyHelp(NamedTuple):
    """A config key, e.g. "MODEL.IOU_BALANCED.CLS_ETA", its default and its comment as one line."""

    key: str
    default: Any
    meaning: str


def config_help() -> list[KeyHelp]:
    """All keys that the project and its projects add to detectron2's, in the order of the files.

    Keys that follow each other and share a comment have the same meaning.

    Returns:
        the keys.
    """
    cfg = get_cfg()
    add_iou_balanced_config(cfg)
    keys = [
        (f"MODEL.IOU_BALANCED.{name.upper()}", meaning)
        for name, meaning in _commented_names(LossOptions)
    ]
    functions: list[Callable[[CfgNode], None]] = [add_iou_balanced_config]
    for name, module in import_projects().items():
        functions.append(getattr(module, f"add_{name}_config"))
    for function in functions:
        names = _commented_names(function)
        keys += [(name.removeprefix("cfg."), meaning) for name, meaning in names]
    return [
        KeyHelp(key, _value(cfg, key), meaning)
        for key, meaning in keys
        if not isinstance(_value(cfg, key), CfgNode)
    ]


def _value(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _commented_names(definition: Callable[..., Any]) -> Iterator[tuple[str, str]]:
    """The names that a function or class sets in its body, such as "cfg.SEED", with comments."""
    source = textwrap.dedent(inspect.getsource(definition))
    lines = source.splitlines()
    tree = ast.parse(source).body[0]
    assert isinstance(tree, ast.FunctionDef | ast.ClassDef)
    meaning = ""
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        above = lines[: node.lineno - 1]
        comment = _comment_at_the_end(above)
        # A comment holds until the next blank line.
        if comment or not above[-1].strip():
            meaning = comment
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        yield ast.unparse(target), meaning


def _comment_at_the_end(lines: list[str]) -> str:
    """The comment in the last lines, as one line."""
    words: list[str] = []
    for line in reversed(lines):
        text = line.strip()
        if not text.startswith("#"):
            break
        words.insert(0, text.lstrip("# "))
    return " ".join(words)


def format_help(keys: list[KeyHelp]) -> str:
    """The keys as text for a terminal; those that share a comment stand together.

    Args:
        keys: from :func:`config_help`.

    Returns:
        lines of at most 100 characters, but for long defaults.
    """
    parts = []
    for i, (key, default, meaning) in enumerate(keys):
        parts.append(f"{key}: {default!r}")
        if i + 1 == len(keys) or keys[i + 1].meaning != meaning:
            parts.append(_paragraph(meaning))
    return "\n".join(parts).rstrip()


def _paragraph(text: str) -> str:
    indent = " " * 4
    return (
        textwrap.fill(
            text, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )
        + "\n"
    )

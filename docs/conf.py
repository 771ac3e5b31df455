"""Sphinx: the documents where they lie, and the reference from the docstrings; see `make docs`.

The source folder is the top of the repository, so that a link from one document to another, or to
a file, is the same path on the code host and in the built pages.
"""

import os
import re
from importlib.util import find_spec
from pathlib import Path

# detectron2 is imported for the sake of the docstrings; no GPU is needed for that.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from docutils.nodes import Element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.util.nodes import make_refnode

import iou_balanced_d2
from iou_balanced_d2.projects import import_projects

import_projects()

ROOT = Path(__file__).resolve().parent.parent

project = author = "iou_balanced_d2"
version = release = iou_balanced_d2.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "docs/modules/*.rst", "projects/**.md"]
exclude_patterns = [".*", "docs/_build", "output*", "datasets", "build", "dist", "venv"]

html_theme = "sphinx_rtd_theme"
html_copy_source = False
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["pages.css"]
templates_path = ["_templates"]
# The page that opens with the built folder; it leads to docs/index.html.
html_additional_pages = {"index": "start.html"}

# Anchors as the code host makes them: of headings up to the third level.
myst_heading_anchors = 3

autodoc_member_order = "bysource"
# The arguments of a class are described where it takes them, in __init__.
autoclass_content = "both"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_typehints_format = "short"
# Defaults as they are written: os.environ, not what it holds where the pages are built.
autodoc_preserve_defaults = True
# A documented attribute of a class is a line of its description, no object of its own.
napoleon_use_ivar = True

# The role of detectron2's own docs for the name of a paper; here it is text.
rst_prolog = ".. role:: paper"

# Classes of torch, detectron2 and the standard library that docstrings call by their last name.
nitpick_ignore_regex = [
    ("py:class", "Boxes|CfgNode|DenseDetector|Instances|Tensor|nn.Module|timedelta")
]

_DEFINED = {
    name
    for folder in ("iou_balanced_d2", "projects")
    for file in (ROOT / folder).rglob("*.py")
    for names in re.findall(
        r"^ *(?:class|def) (\w+)|^(\w+)(?:: .*)? = ", file.read_text("utf-8"), re.MULTILINE
    )
    for name in names
}


def resolve_by_last_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: Element
) -> Element | None:
    """Resolve a Python name that isn't given by the path under which the reference has it.

    Returns:
        a link, if one object of that name is in the reference; the name as plain text, if it is one
        of another package (whose pages aren't looked up: the build needs no network), or defined in
        our code but not part of the reference; None, which is a warning, otherwise.
    """
    if node.get("refdomain") != "py":
        return None
    package, dot, name = node["reftarget"].partition(".")
    if dot and package != iou_balanced_d2.__name__ and find_spec(package):
        return contnode
    name = name.rpartition(".")[2] if package == iou_balanced_d2.__name__ else node["reftarget"]
    objects = env.domaindata["py"]["objects"].items()
    found = {(obj.docname, obj.node_id) for full, obj in objects if f".{full}".endswith(f".{name}")}
    if len(found) == 1:
        ((document, anchor),) = found
        return make_refnode(app.builder, node["refdoc"], document, anchor, contnode)
    return contnode if name.rpartition(".")[2] in _DEFINED else None


def escape_formulas(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Let ``lambda_`` and |d| in docstrings mean themselves, not reStructuredText's links."""
    for i, line in enumerate(lines):
        parts = re.split(r"(``.*?``|`.*?`)", line)
        parts[::2] = [re.sub(r"(?<=\w)_(?!\w)|\|", r"\\\g<0>", part) for part in parts[::2]]
        lines[i] = "".join(parts)


def whole_returns_section(self: GoogleDocstring, preprocess_types: bool = False) -> list:
    """Take "Returns:" as text: types are in the signature, and a colon doesn't end one here."""
    return [("", "", self._dedent(self._consume_to_next_section()))]


GoogleDocstring._consume_returns_section = whole_returns_section


def setup(app: Sphinx) -> None:
    """Connect what is above; 400 is before napoleon, which has 500."""
    app.connect("missing-reference", resolve_by_last_name)
    app.connect("autodoc-process-docstring", escape_formulas, priority=400)

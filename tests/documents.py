"""The documents of the project, and what is in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "docs/modules/*.md", "projects/**/*.md")
    for path in ROOT.glob(pattern)
)


def ids(path):
    """The name of a test about a document."""
    return str(path.relative_to(ROOT))


def blocks(path, language):
    """The contents of a document's code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def with_blocks(language):
    """The documents that have code blocks of a language."""
    return [path for path in DOCUMENTS if blocks(path, language)]

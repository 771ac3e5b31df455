"""One page of a report, as HTML that holds its own figures and as Markdown."""

import base64
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from unicodedata import category
from urllib.parse import quote

import numpy as np
from tabulate import tabulate

_STYLE = """
:root { color-scheme: light dark; }
body { max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff;
       font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
table { overflow-wrap: normal; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
p { max-width: 48rem; }
img { max-width: 100%; height: auto; background: #fff; }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem; }
.tiles figure { margin: 0; width: 20rem; max-width: 100%; }
figcaption { font-size: .85rem; color: #444; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; } .scroll { overflow-x: auto; }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818; }
       figcaption { color: #bbb; } a { color: #8ab4f8; } th, td { border-color: #444; } }
"""


def clean(text: str) -> str:
    """A name or text on one line, without control characters and surrogates."""
    one_line = " ".join(text.splitlines())
    return "".join("\ufffd" if category(c) in ("Cc", "Cs") else c for c in one_line)


# What Markdown would take for code, emphasis, a table, a formula, a tag, an entity or a link,
# and at the start for a headline, a quotation or a list.
_MARKDOWN = re.compile(
    r"[\\`*|$]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|~(?=~)|(?<![^\W_])_|_(?![^\W_])|(?<=\])\("
    r"|^[#>]|^[-+=](?=\s)"
)


def markdown_text(text: str) -> str:
    """Plain text as Markdown that is shown as it is, on one line."""
    return _MARKDOWN.sub(r"\\\g<0>", clean(text))


def _escape(text: str) -> str:
    return escape(clean(text))


class Page:
    """A page, filled from top to bottom, as HTML and as Markdown; all text given is plain text."""

    def __init__(self, title: str):
        """Start the page with its title, which is the headline, too."""
        self._title = _escape(title)
        self._html: list[str] = []
        self._markdown = [f"# {markdown_text(title)}"]

    def _add(self, html: str, markdown: str) -> None:
        self._html.append(html)
        self._markdown.append(markdown)

    def heading(self, text: str) -> None:
        """Start a section."""
        self._add(f"<h2>{_escape(text)}</h2>", f"## {markdown_text(text)}")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._add(f"<p>{_escape(text)}</p>", markdown_text(text))

    def figure(self, file: Path, description: str) -> None:
        """Add a PNG or JPEG at full width; the description is for those who can't see it."""
        self._add(
            f"<p>{_image(file, description)}</p>",
            f"![{markdown_text(description)}]({quote(file.name)})",
        )

    def tiles(self, files: Sequence[Path], captions: Sequence[str]) -> None:
        """Add small pictures side by side, each with its caption; Markdown has the captions."""
        tiles = [
            f"<figure>{_image(file, caption)}<figcaption>{_escape(caption)}</figcaption></figure>"
            for file, caption in zip(files, captions, strict=True)
        ]
        self._add(
            f'<div class="tiles">{"".join(tiles)}</div>', "\n".join(map(markdown_text, captions))
        )

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[Any]], digits: int = 1) -> None:
        """Add a table; numbers are rounded to so many digits, NaN is a dash."""
        names = [clean(name) for name in headers]
        shown = [[_cell(value, digits) for value in row] for row in rows]
        table = tabulate(shown, names, tablefmt="html", disable_numparse=True)
        escaped = [[markdown_text(cell) for cell in row] for row in shown]
        heads = [markdown_text(name) for name in names]
        align = ["left", *["right"] * (len(names) - 1)]
        markdown = tabulate(escaped, heads, "pipe", colalign=align, disable_numparse=True)
        self._add(f'<div class="scroll">{table}</div>', markdown)

    def link(self, text: str, target: str) -> None:
        """Add a paragraph that leads to another file, by its path relative to the page."""
        url = quote(target.encode(errors="surrogateescape"))
        html = f'<p><a href="{_escape(url)}">{_escape(text)}</a></p>'
        self._add(html, f"[{markdown_text(text)}]({url})")

    def html(self) -> str:
        """The page as HTML; nothing it shows lies outside of it."""
        body = "\n".join(self._html)
        return (
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{self._title}</title><style>{_STYLE}</style></head>\n"
            f"<body><h1>{self._title}</h1>\n{body}\n</body></html>\n"
        )

    def markdown(self) -> str:
        """The page as Markdown; its figures are files beside it."""
        return "\n\n".join(self._markdown) + "\n"


def plain(value: Any) -> Any:
    """A value as JSON knows it: named tuples as objects, arrays as lists, null for NaN."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _image(file: Path, description: str) -> str:
    kind = "jpeg" if file.suffix == ".jpg" else "png"
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{_escape(description)}" src="data:image/{kind};base64,{data}">'


def _cell(value: Any, digits: int) -> str:
    if isinstance(value, float):
        return "–" if value != value else f"{value:.{digits}f}"
    return clean(str(value))

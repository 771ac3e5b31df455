"""Reports show every name as it is, in figures, HTML and Markdown."""

import pytest
from matplotlib.text import Text

from iou_balanced_d2.analysis.page import Page, clean, markdown_text
from iou_balanced_d2.analysis.plots import label, new_figure, save_figure

# What other people call their classes and runs.
NAMES = [
    "$\\frac$", "$x", "a$b$c", "_hidden", "<script>alert(1)</script>", "a|b", "two\nlines",
    "bell\x07", "\ud800", "*bold*", "[x](y)", "&lt;", "`code`", "~~gone~~", "\x1b[31mred",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_figures_take_every_name_as_plain_text(tmp_path, name):
    figure, axes = new_figure(3, 2)
    axes[0, 0].plot([0, 1], label=label(name))
    axes[0, 0].set(title=label(name))
    legend = axes[0, 0].legend()
    save_figure(figure, tmp_path / "a.png")
    shown = [text.get_text() for text in legend.get_texts()]
    assert len(shown) == 1  # Matplotlib leaves out what starts with "_"
    assert not any(math for _, math in (Text()._preprocess_math(text) for text in shown))
    assert shown[0].replace("\\$", "$").strip() == clean(name)


def test_markdown_shows_every_name_as_it_is():
    assert markdown_text("a_b 3 < 4, p < .05 [1, 2] +0.5") == "a_b 3 < 4, p < .05 [1, 2] +0.5"
    assert markdown_text("<script>|*x*|`y`") == r"\<script>\|\*x\*\|\`y\`"
    assert markdown_text("[x](http://y) &amp; $z$ _w_") == r"[x]\(http://y) \&amp; \$z\$ \_w\_"
    assert markdown_text("# no headline") == r"\# no headline"


def test_names_break_neither_table_nor_page():
    page = Page("<b>title</b>\n# second")
    page.heading(NAMES[4])
    page.table(["name", "AP"], [[name, 1.0] for name in NAMES])
    page.link("a] (b", "../my run/#1 ü.html")
    lines = page.markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(NAMES)
    assert len([line for line in lines if line.startswith("#")]) == 2
    assert "<script>" not in page.markdown().replace("\\<script>", "")
    assert "(../my%20run/%231%20%C3%BC.html)" in lines[-1]
    assert '<a href="../my%20run/%231%20%C3%BC.html">' in page.html()
    assert "<script>" not in page.html()
    page.html().encode()
    page.markdown().encode()

"""The documents: their code runs, their configs are read, their links lead somewhere."""

import os
import re
import subprocess
import sys

import pytest
import torch

from iou_balanced_d2.engine import load_config

from .browser import browser_or_skip, open_page
from .documents import DOCS, DOCUMENTS, ROOT, blocks, ids, with_blocks


@pytest.mark.parametrize("path", with_blocks("python"), ids=ids)
def test_python_code_runs(path):
    exec(compile("\n".join(blocks(path, "python")), str(path), "exec"), {"__name__": "docs"})


def test_the_tutorials_detector_learns():
    names = {"__name__": "docs"}
    exec("\n".join(blocks(DOCS / "own_detector.md", "python")), names)
    detector, boxes = names["detector"], names["Boxes"](torch.tensor([[8.0, 8.0, 44.0, 40.0]]))
    assert all(p.grad is not None for p in detector.parameters())
    args = (torch.rand(2, 3, 64, 64), [boxes] * 2, [torch.tensor([1])] * 2)
    none = [boxes[[]]] * 2, [torch.zeros(0, dtype=torch.int64)] * 2
    assert all(torch.isfinite(loss) for loss in detector(args[0], *none).values())
    optimizer = torch.optim.Adam(detector.parameters(), lr=0.02)
    history = []
    for _ in range(60):
        losses = detector(*args)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({name: value.item() for name, value in losses.items()})
    assert history[-1]["loss_cls"] < 0.5 * history[0]["loss_cls"]
    assert history[-1]["loss_box_reg"] < 0.5 * history[0]["loss_box_reg"]


@pytest.mark.parametrize("path", with_blocks("yaml"), ids=ids)
def test_configs_are_read(path, tmp_path):
    for name in ("configs", "projects"):
        (tmp_path / name).symlink_to(ROOT / name)
    for text in blocks(path, "yaml"):
        (tmp_path / "my.yaml").write_text(text)
        load_config(str(tmp_path / "my.yaml"))  # raises for a key or a type that is wrong


def test_every_config_is_in_the_model_zoo_and_nothing_else():
    folders = [ROOT / "configs", *ROOT.glob("projects/*/configs")]
    files = [file for folder in folders for file in folder.glob("*/**/*.*") if file.is_file()]
    configs = {str(file.relative_to(ROOT)) for file in files if file.suffix in (".yaml", ".py")}
    linked = set(re.findall(r"\(([^)]+\.(?:yaml|py))\)", (ROOT / "MODEL_ZOO.md").read_text()))
    assert configs == {link for link in linked if "configs/" in link}


def without_code(text):
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(path):
    """Anchors of a document's headings, as the code host makes them."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.is_file(), f"{link}: no such file"
        assert target.is_relative_to(ROOT)
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_every_package_is_in_the_reference():
    packages = {path.parent.name for path in (ROOT / "iou_balanced_d2").glob("*/__init__.py")}
    assert packages <= {path.stem for path in (DOCS / "modules").glob("*.rst")}


def build(folder, **environment):
    """The folder of the pages, made by the command of `make docs`."""
    for name in ("sphinx", "myst_parser", "sphinx_rtd_theme"):
        pytest.importorskip(name, reason=f"{name} is not installed; `make setup` installs it")
    line = next(
        line for line in (ROOT / "Makefile").read_text().splitlines() if "-m sphinx" in line
    )
    words = line.replace("docs/_build", str(folder)).split()[1:]
    env = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    return folder / "html"


def test_pages_are_built_without_a_warning(tmp_path):
    secret = "5ec7e7-of-the-environment"  # such as one that a default of an argument shows
    pages = build(tmp_path, IOU_BALANCED_D2_SECRET=secret)
    for path in DOCUMENTS:
        assert (pages / path.relative_to(ROOT)).with_suffix(".html").is_file()
    for page in pages.rglob("*.html"):
        assert secret not in page.read_text()
        links = re.findall(r'(?:href|src)="([^"#?:]+)[#?"]', page.read_text())
        for link in links:
            assert (page.parent / link).exists(), f"{page.relative_to(pages)}: {link}"
    reference = (pages / "docs/modules/losses.html").read_text()
    assert 'id="iou_balanced_d2.losses.iou_balanced_cls_weights"' in reference
    # The arguments of a class are described in its __init__.
    assert "<strong>focal_loss_alpha</strong>" in (pages / "docs/modules/modeling.html").read_text()


# A page in a frame of a width; the title says whether it is wider, once the theme's script is done.
FRAME = """<!DOCTYPE html><meta charset="utf-8"><title>not measured</title>
<iframe style="border: 0; width: %dpx; height: 3000px" src="%s"></iframe><script>
const frame = document.querySelector("iframe");
frame.onload = () => setTimeout(() => {
  const root = frame.contentDocument.documentElement;
  document.title = root.scrollWidth - root.clientWidth > 1 ? "too wide" : "fine";
}, 800);
</script>"""


@pytest.mark.slow
def test_pages_fit_phones_and_screens(tmp_path):
    browser_or_skip()
    pages, frame = build(tmp_path), tmp_path / "frame.html"
    options = ["--allow-file-access-from-files", "--virtual-time-budget=3000"]
    bad = []
    for path in DOCUMENTS:
        page = (pages / path.relative_to(ROOT)).with_suffix(".html")
        for width in (360, 1280):
            frame.write_text(FRAME % (width, page.as_uri()))
            dom, messages = open_page(frame, tmp_path / "profile", *options)
            assert "CONSOLE" not in messages, messages
            if "<title>fine</title>" not in dom:
                bad.append((page.relative_to(pages), width))
    assert not bad

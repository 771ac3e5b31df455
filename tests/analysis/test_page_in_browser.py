"""The report in a real browser: nothing it complains about, nothing it asks the network for."""

import json
import re

import pytest

from iou_balanced_d2.analysis.alignment import write_alignment_report

from ..browser import browser_or_skip, open_page


@pytest.fixture
def browse(tmp_path):
    """Open a file; returns the page as the browser has it, its messages and the addresses asked."""
    browser_or_skip()

    def browse(file):
        log = tmp_path / "net.json"
        page, messages = open_page(file, tmp_path / "profile", f"--log-net-log={log}")
        return page, messages, set(re.findall(r'"url":"(https?://[^"]+)"', log.read_text()))

    return browse


# Opens a page in a frame of a width, and writes into the title what is wrong with its layout.
FRAME = """<!DOCTYPE html><meta charset="utf-8"><title>not measured</title>
<iframe style="border: 0; width: %dpx; height: 3000px; color-scheme: %s"></iframe><script>
const frame = document.querySelector("iframe");
const luminance = text => {
  const [r, g, b] = text.match(/[0-9.]+/g).map(x => (x / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
frame.onload = () => {
  const page = frame.contentDocument, problems = [];
  const styleOf = element => frame.contentWindow.getComputedStyle(element);
  const root = page.documentElement;
  if (root.scrollWidth > root.clientWidth) problems.push("wider than the window");
  const parts = [...page.body.children].map(x => [x, x.getBoundingClientRect()]);
  parts.forEach(([x, a], i) => parts.slice(i + 1).forEach(([y, b]) => {
    if (a.bottom > b.top + 1 && b.bottom > a.top + 1) problems.push(x.tagName + " on " + y.tagName);
  }));
  const back = luminance(styleOf(page.body).backgroundColor);
  for (const x of page.querySelectorAll("h1, h2, p, td, th, figcaption, a")) {
    const fore = luminance(styleOf(x).color);
    const contrast = (Math.max(fore, back) + 0.05) / (Math.min(fore, back) + 0.05);
    if (contrast < 4.5) problems.push("pale " + x.tagName);
  }
  const mode = back < 0.2 ? "dark" : "light";
  document.title = mode + ": " + (problems.join(", ") || "fine");
};
frame.srcdoc = %s;
</script>"""


def layout_of(browse, folder, html, width, mode):
    file = folder / f"frame_{width}_{mode}.html"
    file.write_text(FRAME % (width, mode, json.dumps(html).replace("</", "<\\/")))
    dom, messages, _ = browse(file)
    assert "CONSOLE" not in messages, messages
    return re.search("<title>(.*?)</title>", dom)[1]


@pytest.mark.filterwarnings("error:constrained_layout not applied")  # no room for the curves
@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_phones_and_screens(browse, tmp_path, own_data, width, mode):
    ground_truth, images = own_data
    detections = tmp_path / "found.json"
    row = {"image_id": 0, "category_id": 7, "bbox": [8, 10, 28, 12], "score": 0.95}
    detections.write_text(json.dumps([row]))
    out, name = tmp_path / "out", "a_long_name_of_a_run/with_lambda_1.5_and_seed_1234567890"
    write_alignment_report(ground_truth, {name: str(detections)}, str(out), image_root=images)
    html = (out / "index.html").read_text()
    assert layout_of(browse, tmp_path, html, width, mode) == f"{mode}: fine"


def test_a_bad_layout_is_found(browse, tmp_path):
    html = "<body style='background: #fff'><p style='width: 500px; color: #ccc'>x</p>"
    html += "<h2 style='margin-top: -50px'>y</h2>"
    found = layout_of(browse, tmp_path, html, 360, "light")
    assert found == "light: wider than the window, P on H2, pale P"


def test_the_page_opens_without_error_or_request(browse, tmp_path, own_data):
    ground_truth, images = own_data
    detections = tmp_path / "found.json"
    row = {"image_id": 0, "category_id": 7, "bbox": [8, 10, 28, 12], "score": 0.95}
    detections.write_text(json.dumps([row]))
    out = tmp_path / "out"
    write_alignment_report(ground_truth, {"mine": str(detections)}, str(out), image_root=images)
    dom, messages, addresses = browse(out / "index.html")
    assert "CONSOLE" not in messages
    # What the browser itself asks its maker for is not the page's doing.
    assert not [a for a in addresses if "google" not in a]
    assert dom.count("<img ") == 6
    assert "mine" in dom


def test_the_browser_does_tell(browse, tmp_path):
    """The test above can fail: an error and a request are seen."""
    page = tmp_path / "bad.html"
    page.write_text('<script>console.error("oh")</script><img src="http://127.0.0.1:9/x.png">')
    _, messages, addresses = browse(page)
    assert "CONSOLE" in messages
    assert "http://127.0.0.1:9/x.png" in addresses

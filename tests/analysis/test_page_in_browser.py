"""The report in a real browser: nothing it complains about, nothing it asks the network for."""

import json
import re
import shutil
import subprocess

import pytest

from iou_balanced_d2.analysis.alignment import write_alignment_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture
def browse(tmp_path):
    """Open a file; returns the page as the browser has it, its messages and the addresses asked."""
    found = [path for path in map(shutil.which, BROWSERS) if path]
    if not found:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")

    def open_page(file):
        log = tmp_path / "net.json"
        command = [
            *(found[0], *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}"),
            *("--enable-logging=stderr", f"--log-net-log={log}", "--dump-dom", file.as_uri()),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        addresses = set(re.findall(r'"url":"(https?://[^"]+)"', log.read_text()))
        return done.stdout, done.stderr, addresses

    return open_page


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

"""Importing the package, with and without detectron2."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_without_detectron2_the_import_says_what_to_run():
    code = "import sys; sys.modules['detectron2'] = None; import iou_balanced_d2"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: iou_balanced_d2 extends detectron2")
    assert "`make setup`" in last


def test_importing_registers_and_is_quiet(tmp_path):
    code = """
import os, iou_balanced_d2
from detectron2.data import DatasetCatalog
from detectron2.modeling import META_ARCH_REGISTRY
assert "IoUBalancedRetinaNet" in META_ARCH_REGISTRY
assert "iou_balanced_demo_train" in DatasetCatalog
assert os.listdir() == []
"""
    env = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_losses_need_no_detectron2():
    """The layers are clean: the pure functions import nothing of what is built on them."""
    package = ROOT / "iou_balanced_d2"
    for path in (*(package / "losses").glob("*.py"), package / "threads.py"):
        text = path.read_text().replace("from ..threads import", "")
        assert "import detectron2" not in text
        assert "from detectron2" not in text
        assert "from .." not in text

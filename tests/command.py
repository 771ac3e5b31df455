"""Running train_net.py as a user does, and starting afresh in this process."""

import os
import subprocess
import sys
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

ROOT = Path(__file__).parent.parent


def run(*args, cwd, timeout=300):
    """Run train_net.py; return (exit code, stdout, stderr)."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "train_net.py"), *map(str, args)]
    done = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
    )
    return done.returncode, done.stdout, done.stderr


def forget_own_data():
    """The catalogs live as long as the process; the user's run starts with fresh ones."""
    if "own" in DatasetCatalog:
        DatasetCatalog.remove("own")
        MetadataCatalog.remove("own")
